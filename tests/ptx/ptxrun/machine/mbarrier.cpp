// mbarrier: phases in shared memory that complete when their arrivals and their transfers' bytes have come.
#include "async.h"
#include "lanes.h"

namespace ptx {
namespace {

// The mbarrier in operand i: its block and its offset there.
struct At {
  int cta;
  uint64_t offset;
  uint64_t key() const { return static_cast<uint64_t>(cta) << 32 | offset; }
};

At at(const Context& c, int i, int lane) {
  const uint64_t address = c.address(i, lane);
  const uint64_t rank = address >> kRankShift;
  const At place{rank == 0 ? c.warp.cta->rank : static_cast<int>(rank) - 1, address & ((1u << kRankShift) - 1)};
  if (place.cta >= static_cast<int>(c.machine.ctas.size())) c.fault("an mbarrier of a block that is not there", lane);
  if (place.offset % 8 != 0) c.fault("a misaligned mbarrier", lane);
  if (place.offset + 8 > c.machine.ctas[place.cta].shared.size) c.fault("an mbarrier out of bounds", lane);
  return place;
}

Outcome initialise(Context& c) {
  each_lane(c.mask, [&](int lane) {
    const At place = at(c, 0, lane);
    const uint64_t count = c.bits(1, lane);
    if (count == 0 || count >= 1u << 20) c.fault("an mbarrier for " + std::to_string(count) + " arrivals", lane);
    Mbarrier b;
    b.expected = static_cast<uint32_t>(count);
    b.pending = static_cast<int64_t>(count);
    b.initialiser = c.machine.agent_of(c.warp, lane);
    b.initialised = c.machine.agents[b.initialiser].clock;
    c.machine.async->mbarriers[{place.cta, place.offset}] = b;
  });
  return Outcome::kNext;
}

// Makes the thread's initialisations visible to the cluster and to the asynchronous proxy.
Outcome fence_initialisation(Context& c) {
  each_lane(c.mask, [&](int lane) {
    const uint32_t agent = c.machine.agent_of(c.warp, lane);
    for (auto& [place, b] : c.machine.async->mbarriers) b.fenced = b.fenced || b.initialiser == agent;
  });
  return Outcome::kNext;
}

// Releases: whoever finds the phase complete sees what was done before. `bytes` may be expected on the way.
void arrive(Context& c, int operand, int lane, int64_t bytes) {
  const At place = at(c, operand, lane);
  Mbarrier& b = c.machine.async->mbarrier(c, place.cta, place.offset, lane);
  if (place.cta != c.warp.cta->rank && !b.fenced) {
    c.fault("an arrival at another block's mbarrier that no fence.mbarrier_init has made visible", lane);
  }
  if (c.machine.has_left(place.cta)) c.fault("an arrival at the mbarrier of a block that has left", lane);
  c.machine.release(c.machine.agent_of(c.warp, lane), b.object);
  b.bytes += bytes;
  --b.pending;
  c.machine.async->update(place.cta, place.offset, b, c.program.label);
}

Outcome arrive_one(Context& c) {
  each_lane(c.mask, [&](int lane) { arrive(c, 1, lane, 0); });
  return Outcome::kNext;
}

Outcome arrive_and_expect(Context& c) {
  each_lane(c.mask, [&](int lane) { arrive(c, 1, lane, static_cast<int64_t>(c.bits(2, lane))); });
  return Outcome::kNext;
}

// "Potentially blocking": it may return false at any time before the phase is complete. Here it waits, but that in a
// random schedule it first returns false now and then.
Outcome try_wait(Context& c) {
  uint32_t complete = 0;
  At waits_at{};
  bool waits = false;
  each_lane(c.mask, [&](int lane) {
    const At place = at(c, 1, lane);
    Mbarrier& b = c.machine.async->mbarrier(c, place.cta, place.offset, lane);
    // The parity of the phase asked for: complete if the current phase has the other one.
    const uint64_t parity = c.bits(2, lane) & 1;
    if ((b.phase & 1) != parity) {
      complete |= 1u << lane;
    } else {
      waits = true, waits_at = place;
    }
  });
  if (waits && !(c.machine.options.random && c.machine.dice() % 4 == 0)) {
    c.group.state = Group::kAtMbarrier;
    c.group.key = waits_at.key();
    return Outcome::kStay;
  }
  each_lane(complete, [&](int lane) {
    const At place = at(c, 1, lane);
    const Mbarrier& b = c.machine.async->mbarriers[{place.cta, place.offset}];
    c.machine.acquire(c.machine.agent_of(c.warp, lane), b.complete);
  });
  c.out_predicate(0, complete);
  return Outcome::kNext;
}

// An address of this block's shared memory as one of block `rank` of the cluster.
Outcome map_to_block(Context& c) {
  const uint32_t* address = c.in<uint32_t>(1);
  const uint32_t* rank = c.in<uint32_t>(2);
  uint32_t* d = c.out<uint32_t>(0);
  each_lane(c.mask, [&](int lane) {
    if (rank[lane] >= c.machine.ctas.size()) c.fault("a block that the cluster has not", lane);
    d[lane] = (rank[lane] + 1) << kRankShift | (address[lane] & ((1u << kRankShift) - 1));
  });
  return Outcome::kNext;
}

// Generic accesses before it, the thread's own and those it knows of, become visible to the asynchronous proxy.
Outcome fence_proxy(Context& c) {
  each_lane(c.mask, [&](int lane) {
    const uint32_t self = c.machine.agent_of(c.warp, lane);
    Agent& agent = c.machine.agents[self];
    agent.seen_by_async = joined(agent.all(self, c.machine.agents.size()), agent.seen_by_async);
    ++agent.clock;
  });
  return Outcome::kNext;
}

Outcome nothing(Context&) { return Outcome::kNext; }

// Registers change hands between warp groups; all of a warp's lanes come together. What the counts mean for the
// compiler cannot be seen in PTX, whose registers are without number.
Outcome set_registers(Context& c) {
  if (!c.machine.gathered(c, c.machine.lanes_of(c.warp))) return Outcome::kStay;
  const uint64_t count = c.uniform(0, "a number of registers that differs between the lanes");
  if (count < 24 || count > 256 || count % 8 != 0) c.fault("a number of registers that a warp cannot have");
  return Outcome::kNext;
}

}  // namespace

void add_mbarrier_ops(OpTable& t) {
  t["mbarrier.init.shared::cta.b64"] = {initialise};
  t["fence.mbarrier_init.release.cluster"] = {fence_initialisation};
  t["mbarrier.arrive.shared::cta.b64"] = {arrive_one};
  t["mbarrier.arrive.shared::cluster.b64"] = {arrive_one};
  t["mbarrier.arrive.expect_tx.shared::cta.b64"] = {arrive_and_expect};
  t["mbarrier.try_wait.parity.shared::cta.b64"] = {try_wait};
  t["mapa.shared::cluster.u32"] = {map_to_block};
  t["fence.proxy.async.shared::cta"] = {fence_proxy};
  t["prefetch.tensormap"] = {nothing};
  t["setmaxnreg.inc.sync.aligned.u32"] = {set_registers, true};
  t["setmaxnreg.dec.sync.aligned.u32"] = {set_registers, true};
}

}  // namespace ptx
