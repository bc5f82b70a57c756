// Instructions between the lanes of a warp. All lanes that a mask names must come to the same one, and no lane may come
// to one whose mask leaves it out.
#include "lanes.h"

namespace ptx {
namespace {

// The mask in operand i, or false where lanes of it are yet to come.
bool all_here(Context& c, int i) {
  const auto mask = static_cast<uint32_t>(c.uniform(i, "a member mask that differs between the lanes"));
  if (c.mask & ~mask) c.fault("a lane that the member mask leaves out", __builtin_ctz(c.mask & ~mask));
  return c.machine.gathered(c, mask);
}

enum class Shuffle { kUp, kDown, kButterfly, kIndex };

// PTX's own rules. b: a lane or a distance, its low 5 bits. c: the clamp in bits 0-4, the segment mask in bits 8-12.
// A lane reads from j if j is on the right side of the segment's end, else its own value; d|p says which in p.
template <Shuffle kMode>
Outcome shuffle(Context& c) {
  const bool has_predicate = c.instruction.counts[0] == 2;
  const int first = has_predicate ? 2 : 1;
  if (!all_here(c, first + 3)) return Outcome::kStay;
  const uint32_t* a = c.in<uint32_t>(first);
  const uint32_t* b = c.in<uint32_t>(first + 1);
  const uint32_t* clamps = c.in<uint32_t>(first + 2);
  uint32_t results[kLanes];
  uint32_t predicate = 0;
  each_lane(c.mask, [&](int lane) {
    const int by = b[lane] & 31;
    const int clamp = clamps[lane] & 31;
    const int segment = clamps[lane] >> 8 & 31;
    const int least = lane & segment;
    const int most = least | (clamp & ~segment);
    int j = 0;
    bool in = false;
    switch (kMode) {
      case Shuffle::kUp:
        j = lane - by;
        in = j >= most;  // the clamp of .up is the segment's lower end
        break;
      case Shuffle::kDown:
        j = lane + by;
        in = j <= most;
        break;
      case Shuffle::kButterfly:
        j = lane ^ by;
        in = j <= most;
        break;
      case Shuffle::kIndex:
        j = least | (by & ~segment);
        in = j <= most;
        break;
    }
    if (!in) j = lane;
    if (!(c.mask >> j & 1)) c.fault("a value from lane " + std::to_string(j) + ", which is not here", lane);
    results[lane] = a[j];
    predicate |= static_cast<uint32_t>(in) << lane;
  });
  uint32_t* d = c.out<uint32_t>(0);
  each_lane(c.mask, [&](int lane) { d[lane] = results[lane]; });
  if (has_predicate) c.out_predicate(1, predicate);
  return Outcome::kNext;
}

Outcome ballot(Context& c) {
  if (!all_here(c, 2)) return Outcome::kStay;
  const uint32_t votes = c.in_predicate(1) & c.mask;
  uint32_t* d = c.out<uint32_t>(0);
  each_lane(c.mask, [&](int lane) { d[lane] = votes; });
  return Outcome::kNext;
}

template <bool kAll>
Outcome vote(Context& c) {
  if (!all_here(c, 2)) return Outcome::kStay;
  const uint32_t votes = c.in_predicate(1) & c.mask;
  const bool result = kAll ? votes == c.mask : votes != 0;
  c.out_predicate(0, result ? kAllLanes : 0);
  return Outcome::kNext;
}

// d|p: PTX leaves it to the device which lane leads, as long as it is the same one every time. CUTLASS relies on the
// lowest: its pipelines let thread 0 expect a transfer's bytes, and the elected lane start the transfer.
Outcome elect(Context& c) {
  if (!all_here(c, 2)) return Outcome::kStay;
  const int leader = __builtin_ctz(c.mask);
  if (c.operand(0).kind != Operand::kSink) {
    uint32_t* d = c.out<uint32_t>(0);
    each_lane(c.mask, [&](int lane) { d[lane] = static_cast<uint32_t>(leader); });
  }
  c.out_predicate(1, 1u << leader);
  return Outcome::kNext;
}

// bar.warp.sync: the named lanes wait for each other, and see each other's accesses.
Outcome warp_barrier(Context& c) {
  if (!all_here(c, 0)) return Outcome::kStay;
  std::vector<uint32_t> of;
  each_lane(c.mask, [&](int lane) { of.push_back(c.machine.agent_of(c.warp, lane)); });
  c.machine.synchronise(of);
  return Outcome::kNext;
}

}  // namespace

void add_warp_ops(OpTable& t) {
  t["shfl.sync.up.b32"] = {shuffle<Shuffle::kUp>, true};
  t["shfl.sync.down.b32"] = {shuffle<Shuffle::kDown>, true};
  t["shfl.sync.bfly.b32"] = {shuffle<Shuffle::kButterfly>, true};
  t["shfl.sync.idx.b32"] = {shuffle<Shuffle::kIndex>, true};
  t["vote.sync.ballot.b32"] = {ballot, true};
  t["vote.sync.all.pred"] = {vote<true>, true};
  t["vote.sync.any.pred"] = {vote<false>, true};
  t["elect.sync"] = {elect, true};
  t["bar.warp.sync"] = {warp_barrier, true};
}

}  // namespace ptx
