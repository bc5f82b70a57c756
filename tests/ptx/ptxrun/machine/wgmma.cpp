// wgmma: products of tiles in shared memory, by a warp group of 128 threads, beside them; and stmatrix.
#include <bit>

#include "async.h"
#include "lanes.h"

namespace ptx {
namespace {

constexpr int kWarpsOfGroup = 4;

// Whether all four warps of the group are at this instruction. The last one to come goes on for all of them.
bool warp_group_here(Context& c, std::vector<Warp*>& warps) {
  if (!c.machine.gathered(c, kAllLanes)) return false;
  const int first = c.warp.number / kWarpsOfGroup * kWarpsOfGroup;
  if (first + kWarpsOfGroup > static_cast<int>(c.warp.cta->warps.size())) c.fault("no whole warp group");
  int here = 1;
  for (int w = first; w < first + kWarpsOfGroup; ++w) {
    Warp& warp = c.warp.cta->warps[w];
    warps.push_back(&warp);
    if (&warp == &c.warp) continue;
    for (const Group& g : warp.groups) here += g.state == Group::kAtWarpGroup && g.pc == c.group.pc;
  }
  if (here == kWarpsOfGroup) {
    for (Warp* warp : warps) {
      for (Group& g : warp->groups) {
        if (g.state != Group::kAtWarpGroup) continue;
        g.state = Group::kRunning;
        ++g.pc;
      }
    }
    return true;
  }
  c.group.state = Group::kAtWarpGroup;
  return false;
}

Bulk& bulk_of(Context& c) {
  return c.machine.async->multiplications[{c.warp.cta->rank, c.warp.number / kWarpsOfGroup}];
}

// What all of the warps know: a wait that one of them has left out is missing.
Knowledge known_to_all(Context& c, const std::vector<Warp*>& warps, Knowledge Agent::* which) {
  auto all = std::make_shared<std::vector<Clock>>(c.machine.agents.size(), ~Clock{0});
  for (const Warp* warp : warps) {
    const Knowledge& of_warp = c.machine.agents[c.machine.agent_of(*warp, 0)].*which;
    for (size_t i = 0; i < all->size(); ++i) (*all)[i] = std::min((*all)[i], clock_in(of_warp, i));
  }
  return all;
}

// A K-major tile of 16-bit numbers, in rows of 128 bytes swizzled by 128: from a matrix descriptor.
struct Tile {
  uint64_t start;       // in bytes
  uint64_t eight_rows;  // from one group of 8 rows to the next
  explicit Tile(uint64_t descriptor)
      : start((descriptor & 0x3fff) << 4), eight_rows((descriptor >> 32 & 0x3fff) << 4) {}
  static bool known(uint64_t descriptor) { return descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0; }
  uint64_t piece(int row, int bytes) const {
    const uint64_t at = start + row / 8 * eight_rows + row % 8 * 128 + bytes;
    return at ^ (at >> 7 & 7) << 4;
  }
};

template <bool kBFloat16>
float number(uint16_t bits) {
  if constexpr (kBFloat16) return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  return static_cast<float>(std::bit_cast<_Float16>(bits));
}

template <bool kBFloat16>
std::vector<float> read_tile(Machine& machine, const std::string& who, const Operation& by, Cta& cta, Tile tile,
                             int rows) {
  std::vector<float> out(static_cast<size_t>(rows) * 16);
  for (int row = 0; row < rows; ++row) {
    for (int half = 0; half < 2; ++half) {
      const Touched t =
          touch(machine, {&cta.shared, tile.piece(row, half * 16)}, 16, false, machine.async->accessor(by));
      if (t.bytes == nullptr) throw Fault(who + ": " + t.wrong);
      uint16_t values[8];
      std::memcpy(values, t.bytes, 16);
      for (int i = 0; i < 8; ++i) out[row * 16 + half * 8 + i] = number<kBFloat16>(values[i]);
    }
  }
  return out;
}

// d [64, N] in the registers of 128 threads, += a [64, 16] b [N, 16]^T.
template <bool kBFloat16, int kColumns>
Outcome multiply(Context& c) {
  constexpr int kRegisters = kColumns / 2;
  std::vector<Warp*> warps;
  if (!warp_group_here(c, warps)) return Outcome::kStay;
  uint64_t descriptors[2] = {};
  bool adds = false;
  for (size_t w = 0; w < warps.size(); ++w) {
    Context of{c.machine, *warps[w], c.group, c.instruction, c.program, kAllLanes};
    const uint64_t a = of.uniform(kRegisters, "descriptors that differ between the lanes");
    const uint64_t b = of.uniform(kRegisters + 1, "descriptors that differ between the lanes");
    const uint32_t p = of.in_predicate(kRegisters + 2);
    if (p != 0 && p != kAllLanes) of.fault("a predicate that differs between the lanes");
    if (w > 0 && (a != descriptors[0] || b != descriptors[1] || adds != (p != 0))) of.fault("warps that do not agree");
    descriptors[0] = a, descriptors[1] = b, adds = p != 0;
    for (int i = 0; i < kRegisters; ++i) {
      const Operand& d = of.operand(i);
      if (adds && warps[w]->defined[d.index] != kAllLanes && !warps[w]->in_flight[d.index]) {
        of.fault("accumulators that nothing has written");
      }
      if (warps[w]->fenced == 0 || warps[w]->written[d.index] > warps[w]->fenced) {
        of.fault("register " + c.program.register_names[d.index] + " was touched after the last wgmma.fence");
      }
    }
  }
  // Signs of the operands, and that both are K-major: immediates.
  const uint64_t expected[4] = {1, 1, 0, 0};
  for (int i = 0; i < 4; ++i) {
    if (c.bits(kRegisters + 3 + i, 0) != expected[i]) c.fault("a form of wgmma that is not known here");
  }
  if (!Tile::known(descriptors[0]) || !Tile::known(descriptors[1])) c.fault("a layout that is not known here");

  Operation o = c.machine.async->start(c.machine.agent_of(*warps[0], 0));
  o.seen = known_to_all(c, warps, &Agent::seen);
  o.seen_writes = known_to_all(c, warps, &Agent::seen_by_async);
  std::vector<uint32_t> slots;
  for (int i = 0; i < kRegisters; ++i) {
    const Operand& d = c.operand(i);
    slots.push_back(d.slot);
    o.registers.push_back(d.index);
    for (Warp* warp : warps) {
      warp->in_flight[d.index] = true;
      warp->any_in_flight = true;
      warp->defined[d.index] = kAllLanes;
    }
  }
  const std::string who = c.program.label + ": " + c.instruction.opcode;
  Machine& machine = c.machine;
  o.effect = [=, &machine, a = descriptors[0], b = descriptors[1]](Operation& by) {
    Cta& cta = *warps[0]->cta;
    const std::vector<float> left = read_tile<kBFloat16>(machine, who, by, cta, Tile(a), 64);
    const std::vector<float> right = read_tile<kBFloat16>(machine, who, by, cta, Tile(b), kColumns);
    for (int w = 0; w < kWarpsOfGroup; ++w) {
      for (int i = 0; i < kRegisters; ++i) {
        auto* d = reinterpret_cast<float*>(warps[w]->file + slots[i]);
        for (int lane = 0; lane < kLanes; ++lane) {
          // PTX's layout of the accumulators.
          const int row = 16 * w + lane / 4 + 8 * (i / 2 % 2);
          const int column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
          double sum = adds ? d[lane] : 0;
          for (int k = 0; k < 16; ++k) sum += double{left[row * 16 + k]} * right[column * 16 + k];
          d[lane] = static_cast<float>(sum);
        }
      }
    }
  };
  ++machine.counts.wgmmas;
  if (!machine.options.late) {
    o.effect(o);
    o.effect = nullptr;
  }
  bulk_of(c).open.push_back(std::move(o));
  return Outcome::kNext;
}

// Orders registers before the wgmma that follow.
Outcome fence(Context& c) {
  if (!c.machine.gathered(c, kAllLanes)) return Outcome::kStay;
  c.warp.fenced = c.machine.now;
  return Outcome::kNext;
}

Outcome commit(Context& c) {
  std::vector<Warp*> warps;
  if (!warp_group_here(c, warps)) return Outcome::kStay;
  Async::commit(bulk_of(c));
  return Outcome::kNext;
}

Outcome wait(Context& c) {
  std::vector<Warp*> warps;
  if (!warp_group_here(c, warps)) return Outcome::kStay;
  std::vector<uint32_t> threads;
  for (Warp* warp : warps) {
    each_lane(kAllLanes, [&](int lane) { threads.push_back(c.machine.agent_of(*warp, lane)); });
  }
  Bulk& bulk = bulk_of(c);
  c.machine.async->wait(bulk, c.bits(0, 0), threads);
  for (Warp* warp : warps) {
    std::fill(warp->in_flight.begin(), warp->in_flight.end(), 0);
    warp->any_in_flight = false;
    const auto mark = [&](const std::vector<Operation>& of) {
      for (const Operation& o : of) {
        for (const uint32_t r : o.registers) warp->in_flight[r] = true;
        warp->any_in_flight = true;
      }
    };
    for (const auto& group : bulk.groups) mark(group);
    mark(bulk.open);
  }
  return Outcome::kNext;
}

// Four 8x8 matrices of 16-bit numbers from a warp's registers: lane l has row l / 4, columns 2 (l % 4) and the next.
// Lane 8 m + r gives the address of matrix m's row r.
Outcome store_matrices(Context& c) {
  if (!c.machine.gathered(c, kAllLanes)) return Outcome::kStay;
  for (int m = 0; m < 4; ++m) {
    const uint32_t* values = c.in<uint32_t>(1 + m);
    for (int row = 0; row < 8; ++row) {
      const int giver = 8 * m + row;
      const uint64_t address = c.address(0, giver);
      if (address % 16 != 0) c.fault("a row off a 16-byte boundary", giver);
      for (int part = 0; part < 4; ++part) {
        const int lane = 4 * row + part;
        const uint32_t self = c.machine.agent_of(c.warp, lane);
        const Agent& agent = c.machine.agents[self];
        const Touched t = touch(c.machine, place_of(c.machine, c.warp, Space::kShared, address + 4 * part), 4, true,
                                {self, agent.clock, agent.seen.get(), agent.seen.get()});
        if (t.bytes == nullptr) c.fault(t.wrong, lane);
        std::memcpy(t.bytes, &values[lane], 4);
      }
    }
  }
  return Outcome::kNext;
}

}  // namespace

void add_wgmma_ops(OpTable& t) {
  t["wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16"] = {multiply<true, 192>, true};
  t["wgmma.mma_async.sync.aligned.m64n192k16.f32.f16.f16"] = {multiply<false, 192>, true};
  t["wgmma.fence.sync.aligned"] = {fence, true};
  t["wgmma.commit_group.sync.aligned"] = {commit, true};
  t["wgmma.wait_group.sync.aligned"] = {wait, true};
  t["stmatrix.sync.aligned.x4.m8n8.shared.b16"] = {store_matrices, true};
}

}  // namespace ptx
