// Branches, returns and barriers.
#include "lanes.h"

namespace ptx {
namespace {

// The scheduler takes a branch itself (Machine::run_group).
Outcome branch(Context& c) { c.fault("a branch without a target"); }

Outcome leave(Context& c) {
  c.warp.exited |= c.mask;
  c.group.lanes &= ~c.mask;
  if (c.group.lanes != 0) return Outcome::kNext;
  c.warp.groups.erase(c.warp.groups.begin() + (&c.group - c.warp.groups.data()));
  return Outcome::kStay;
}

// bar.sync is .aligned: all lanes of the warp are at the same one. Without a count it is for the whole block.
Outcome barrier(Context& c) {
  if (!c.machine.gathered(c, c.machine.lanes_of(c.warp))) return Outcome::kStay;
  const auto id = static_cast<uint32_t>(c.uniform(0, "a barrier's number that differs between the lanes"));
  const auto threads = static_cast<uint32_t>(c.machine.launch->block.count());
  const uint32_t all = (threads + kLanes - 1) / kLanes * kLanes;
  const uint32_t expected =
      c.size() > 1 ? static_cast<uint32_t>(c.uniform(1, "a barrier's count that differs between the lanes")) : all;
  c.machine.arrive_at_barrier(c, id, expected);
  return Outcome::kStay;
}

template <bool kReleases>
Outcome cluster_arrive(Context& c) {
  if (!c.machine.gathered(c, c.machine.lanes_of(c.warp))) return Outcome::kStay;
  c.machine.arrive_at_cluster_barrier(c, kReleases);
  return Outcome::kNext;
}

Outcome cluster_wait(Context& c) {
  if (!c.machine.gathered(c, c.machine.lanes_of(c.warp))) return Outcome::kStay;
  return c.machine.cluster_has_arrived(c) ? Outcome::kNext : Outcome::kStay;
}

}  // namespace

void add_control_ops(OpTable& t) {
  t["bra"] = {branch};
  t["bra.uni"] = {branch};
  t["ret"] = {leave};
  t["exit"] = {leave};
  t["bar.sync"] = {barrier, true};
  t["barrier.cluster.arrive.aligned"] = {cluster_arrive<true>, true};
  t["barrier.cluster.arrive.relaxed.aligned"] = {cluster_arrive<false>, true};
  t["barrier.cluster.wait.aligned"] = {cluster_wait, true};
}

}  // namespace ptx
