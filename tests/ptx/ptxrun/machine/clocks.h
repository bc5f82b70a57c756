// Who knows of what: vector clocks, by which two accesses of memory are ordered or a race.
//
// An agent is a thread of the cluster, or an operation that a thread started and that runs beside it (a TMA transfer, a
// wgmma). Its clock counts what it has made known: every barrier, arrival or start of an operation. An access is
// stamped with its agent and the agent's clock; agent B may touch the place after agent A if B has learnt, through
// barriers, of that clock of A. This is FastTrack (Flanagan and Freund, 2009), which finds every race of the
// accesses that were made, whichever order they happened to be made in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace ptx {

using Clock = uint32_t;
// [agents]: of every agent, the last clock known. Shared between those who know the same, and never changed.
using Knowledge = std::shared_ptr<const std::vector<Clock>>;

inline Clock clock_in(const Knowledge& knowledge, uint32_t agent) { return knowledge ? (*knowledge)[agent] : 0; }

inline void join_into(std::vector<Clock>& into, const Knowledge& other) {
  if (!other) return;
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], (*other)[i]);
}

inline Knowledge joined(const Knowledge& a, const Knowledge& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  auto both = std::make_shared<std::vector<Clock>>(*a);
  join_into(*both, b);
  return both;
}

struct Agent {
  Clock clock = 1;
  Knowledge seen;  // of others; an agent knows its own accesses in any case
  // What it knows to be visible to the asynchronous proxy (TMA and wgmma): generic accesses before a fence.proxy.async
  // of the agent that made them, or of one that knew of them.
  Knowledge seen_by_async;

  // `seen` with its own clock in it: what whoever synchronises with it learns.
  Knowledge all(uint32_t self, size_t agents) const {
    auto out = seen ? std::make_shared<std::vector<Clock>>(*seen) : std::make_shared<std::vector<Clock>>(agents, 0);
    (*out)[self] = clock;
    return out;
  }
};

}  // namespace ptx
