// What runs beside the threads that started it: TMA transfers and wgmma.
//
// An operation is an agent of its own (clocks.h): it knows what the thread that started it had made known to the
// asynchronous proxy, its accesses are its own, and nobody is in order after them but those who waited as PTX asks. So
// a missing wait, commit or fence is a race whether the operation takes effect at once or late. With Options::late it
// takes effect as late as the waits allow: what was read too early shows in the numbers as well.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <utility>
#include <vector>

#include "machine.h"
#include "spaces.h"

namespace ptx {

struct Mbarrier {
  uint32_t expected = 0;
  int64_t pending = 0;  // arrivals of this phase that are to come
  int64_t bytes = 0;    // of this phase that are to come: expected by expect_tx, and subtracted by transfers
  uint32_t phase = 0;   // whose parity try_wait asks for; how many are complete
  bool fenced = false;  // its initialisation is visible to the asynchronous proxy and to the cluster's other blocks
  uint32_t initialiser = 0;  // and its clock then
  Clock initialised = 0;
  uint64_t published = 0;  // the phase of the cluster's barrier whose waiters may use it: the initialiser's next one
  Agent object;            // what arrivals of this phase make known
  Agent complete;          // what those who find the last phase complete learn
};

struct Operation {
  uint32_t agent = 0;
  Clock clock = 0;
  Knowledge seen;         // of what is ordered before it, in general
  Knowledge seen_writes;  // of generic writes that are visible to it
  std::function<void(Operation&)> effect;
  std::vector<uint32_t> registers = {};  // of a wgmma: its accumulators
};

// Operations that a thread committed together.
struct Bulk {
  std::vector<Operation> open;                // not committed yet
  std::deque<std::vector<Operation>> groups;  // committed, the oldest first
};

struct Async {
  explicit Async(Machine& of) : machine(of) {}
  Machine& machine;

  // By block and offset in its shared memory.
  std::map<std::pair<int, uint64_t>, Mbarrier> mbarriers;
  std::deque<Operation> loads;      // in flight; whoever waits at their mbarriers is all that waits for them
  std::map<uint32_t, Bulk> stores;  // of a thread
  std::map<std::pair<int, int>, Bulk> multiplications;  // of a block's warp group

  void start_cluster();
  // Lets one transfer take effect that was put off. False if there is none.
  bool complete_one();
  // The kernel's end: nothing that somebody had to wait for may be left.
  void finish_cluster();

  // A new operation of a thread, that knows what the thread knows now.
  Operation start(uint32_t thread);
  Accessor accessor(const Operation& o) const { return {o.agent, o.clock, o.seen.get(), o.seen_writes.get()}; }
  // Waiters learn that the operation is complete, and what it was ordered after.
  void make_known(const Operation& o, Agent& to);

  // An mbarrier that the thread may use, for its initialisation is visible to it.
  Mbarrier& mbarrier(const Context& c, int cta, uint64_t offset, int lane);
  // A thread arrives at the cluster's barrier: its mbarriers that have been fenced are visible to whoever waits there.
  void publish_initialisations(uint32_t agent, uint64_t cluster_phase);
  // Checks whether its phase is complete after an arrival or a transfer.
  void update(int cta, uint64_t offset, Mbarrier& b, const std::string& who);

  // Commits what a thread (warp group) has started, or waits until at most `most` groups are not complete.
  static void commit(Bulk& bulk);
  void wait(Bulk& bulk, size_t most, const std::vector<uint32_t>& threads);

 private:
  uint32_t next_agent_ = 0;
};

}  // namespace ptx
