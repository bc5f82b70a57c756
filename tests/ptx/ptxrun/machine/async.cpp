#include "async.h"

namespace ptx {

void Async::start_cluster() {
  mbarriers.clear();
  loads.clear();
  stores.clear();
  multiplications.clear();
  next_agent_ = 0;
}

bool Async::complete_one() {
  if (loads.empty()) return false;
  // Transfers come in any order.
  const size_t which = machine.options.random ? machine.dice() % loads.size() : 0;
  Operation o = std::move(loads[which]);
  loads.erase(loads.begin() + static_cast<std::ptrdiff_t>(which));
  o.effect(o);
  return true;
}

void Async::finish_cluster() {
  for (auto& [thread, bulk] : stores) {
    if (!bulk.open.empty()) throw Fault("a TMA store that was never committed, of thread " + std::to_string(thread));
    if (!bulk.groups.empty()) {
      throw Fault("TMA stores of thread " + std::to_string(thread) +
                  " that nobody waited for: they read shared memory that its block no longer has");
    }
  }
  for (auto& [group, bulk] : multiplications) {
    if (!bulk.open.empty() || !bulk.groups.empty()) {
      throw Fault("a wgmma that nobody waited for, of block " + std::to_string(group.first) + "'s warp group " +
                  std::to_string(group.second));
    }
  }
}

Operation Async::start(uint32_t thread) {
  Operation o;
  o.agent = machine.threads() + next_agent_++ % kAsyncAgents;
  o.clock = ++machine.agents[o.agent].clock;
  Agent& by = machine.agents[thread];
  o.seen = by.all(thread, machine.agents.size());
  o.seen_writes = by.seen_by_async;
  ++by.clock;
  return o;
}

void Async::make_known(const Operation& o, Agent& to) {
  auto all = std::make_shared<std::vector<Clock>>(machine.agents.size(), 0);
  join_into(*all, o.seen);
  join_into(*all, to.seen);
  (*all)[o.agent] = std::max((*all)[o.agent], o.clock);
  to.seen = all;
  to.seen_by_async = joined(to.seen_by_async, o.seen_writes);
}

Mbarrier& Async::mbarrier(const Context& c, int cta, uint64_t offset, int lane) {
  const auto found = mbarriers.find({cta, offset});
  if (found == mbarriers.end()) {
    c.fault("no mbarrier has been initialised at " + std::to_string(offset) + " of block " + std::to_string(cta), lane);
  }
  Mbarrier& b = found->second;
  const uint32_t agent = machine.agent_of(c.warp, lane);
  const bool told = clock_in(machine.agents[agent].seen, b.initialiser) >= b.initialised;
  const bool met = b.published != 0 && c.warp.cluster_waited >= b.published;
  if (agent != b.initialiser && !told && !met) {
    c.fault("an mbarrier whose initialisation nothing has made visible to this thread", lane);
  }
  return b;
}

void Async::publish_initialisations(uint32_t agent, uint64_t cluster_phase) {
  for (auto& [place, b] : mbarriers) {
    if (b.fenced && b.initialiser == agent && b.published == 0) b.published = cluster_phase;
  }
}

void Async::update(int cta, uint64_t offset, Mbarrier& b, const std::string& who) {
  if (b.pending < 0) throw Fault(who + ": more arrivals at an mbarrier than it was initialised for");
  if (b.pending != 0 || b.bytes != 0) return;
  b.pending = b.expected;
  ++b.phase;
  b.complete = b.object;
  ++machine.counts.mbarrier_phases;
  machine.wake(Group::kAtMbarrier, static_cast<uint64_t>(cta) << 32 | offset, false);
}

void Async::commit(Bulk& bulk) { bulk.groups.push_back(std::exchange(bulk.open, {})); }

void Async::wait(Bulk& bulk, size_t most, const std::vector<uint32_t>& threads) {
  while (bulk.groups.size() > most) {
    for (Operation& o : bulk.groups.front()) {
      if (o.effect) o.effect(o);
      // Threads that know the same learn the same.
      Agent last, learnt;
      for (const uint32_t thread : threads) {
        Agent& to = machine.agents[thread];
        if (thread == threads.front() || to.seen != last.seen || to.seen_by_async != last.seen_by_async) {
          last = learnt = to;
          make_known(o, learnt);
        }
        to.seen = learnt.seen, to.seen_by_async = learnt.seen_by_async;
      }
    }
    bulk.groups.pop_front();
  }
}

}  // namespace ptx
