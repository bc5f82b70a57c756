// cp.async.bulk.tensor: boxes of a tensor to and from shared memory, beside the threads.
#include "async.h"
#include "lanes.h"
#include "tensor_map.h"

namespace ptx {
namespace {

constexpr int kPiece = 16;  // bytes that swizzling keeps together

struct Box {
  TensorMap map;
  int64_t at[5] = {};  // the first element

  int64_t bytes() const {
    int64_t b = map.element_bytes;
    for (uint32_t d = 0; d < map.rank; ++d) b *= map.box[d];
    return b;
  }

  // Calls f(offset in shared memory from the box's start, address of the piece, bytes of it inside of the tensor).
  template <typename F>
  void each_piece(uint64_t shared_start, F f) const {
    const int64_t row_bytes = int64_t{map.box[0]} * map.element_bytes;
    const int64_t rows = bytes() / row_bytes;
    for (int64_t row = 0; row < rows; ++row) {
      bool inside = true;
      uint64_t address = map.address;
      int64_t left = row;
      for (uint32_t d = 1; d < map.rank; ++d) {
        const int64_t i = at[d] + left % map.box[d];
        left /= map.box[d];
        inside = inside && i >= 0 && i < map.dims[d];
        address += static_cast<uint64_t>(i) * map.strides[d - 1];
      }
      for (int64_t b = 0; b < row_bytes; b += kPiece) {
        const int64_t first = at[0] * map.element_bytes + b;
        const int64_t end = int64_t{map.dims[0]} * map.element_bytes;
        int64_t valid = inside ? std::min<int64_t>(kPiece, end - first) : 0;
        if (first < 0) valid = 0;  // no kernel of ours starts left of a tensor
        uint64_t to = shared_start + static_cast<uint64_t>(row * row_bytes + b);
        // The lowest bits of the row of 128 bytes go into the piece's place in it.
        static constexpr uint64_t kRows[] = {0, 1, 3, 7};
        to ^= (to >> 7 & kRows[map.swizzle]) << 4;
        f(to, address + static_cast<uint64_t>(first), std::max<int64_t>(valid, 0));
      }
    }
  }
};

Box box_at(const Context& c, int map_operand, int coordinates, int lane) {
  Box box;
  const uint64_t address = c.address(map_operand, lane);
  const Place place = place_of(c.machine, c.warp, Space::kGlobal, address);
  if (place.allocation == nullptr || address % 64 != 0 || place.offset + 128 > place.allocation->size) {
    c.fault("a tensor map that is not there", lane);
  }
  std::memcpy(&box.map, place.allocation->data + place.offset, sizeof(box.map));
  if (box.map.magic != TensorMap::kMagic) c.fault("a tensor map that no cuTensorMapEncodeTiled has written", lane);
  if (static_cast<int>(box.map.rank) != coordinates) c.fault("coordinates of another rank than the tensor's", lane);
  for (int d = 0; d < coordinates; ++d) box.at[d] = static_cast<int32_t>(c.bits(map_operand + 1 + d, lane));
  return box;
}

std::byte* touched(Machine& machine, const std::string& who, const Operation& o, Place place, uint64_t bytes,
                   bool write) {
  const Touched t = touch(machine, place, bytes, write, machine.async->accessor(o));
  if (t.bytes == nullptr) throw Fault(who + ": " + t.wrong);
  return t.bytes;
}

// operands: [destination], [map, {coordinates}], [mbarrier], with multicast the blocks' mask, the cache's hint
template <bool kMulticast>
Outcome load(Context& c) {
  const int coordinates = c.instruction.counts[1] - 1;
  const int bar = 2 + coordinates;
  each_lane(c.mask, [&](int lane) {
    const Box box = box_at(c, 1, coordinates, lane);
    const uint64_t to = c.address(0, lane);
    const uint64_t barrier = c.address(bar, lane);
    if (to % 128 != 0) c.fault("a TMA destination off a 128-byte boundary", lane);
    const int self = c.warp.cta->rank;
    const auto blocks = kMulticast ? static_cast<uint32_t>(c.bits(bar + 1, lane)) : 1u << self;
    if (blocks == 0 || blocks >> c.machine.ctas.size() != 0) c.fault("a multicast to blocks that are not there", lane);
    Operation o = c.machine.async->start(c.machine.agent_of(c.warp, lane));
    const uint64_t to_offset = to & ((1u << kRankShift) - 1);
    const uint64_t barrier_offset = barrier & ((1u << kRankShift) - 1);
    const std::string who = c.program.label + ": " + c.instruction.text.substr(0, 90);
    Machine& machine = c.machine;
    for (uint32_t left = blocks; left != 0; left &= left - 1) {
      const int cta = __builtin_ctz(left);
      Mbarrier& b = machine.async->mbarrier(c, cta, barrier_offset, lane);
      if (!b.fenced) c.fault("a transfer to an mbarrier that no fence.mbarrier_init has made visible to it", lane);
    }
    o.effect = [=, &machine](Operation& by) {
      for (uint32_t left = blocks; left != 0; left &= left - 1) {
        if (machine.has_left(__builtin_ctz(left))) throw Fault(who + ": a transfer to a block that has left");
      }
      const Warp& any = machine.ctas[self].warps[0];
      box.each_piece(to_offset, [&](uint64_t offset, uint64_t address, int64_t valid) {
        std::byte piece[kPiece] = {};  // zeros outside of the tensor
        if (valid > 0) {
          std::memcpy(piece, touched(machine, who, by, place_of(machine, any, Space::kGlobal, address), valid, false),
                      valid);
        }
        for (uint32_t left = blocks; left != 0; left &= left - 1) {
          Allocation* shared = &machine.ctas[__builtin_ctz(left)].shared;
          std::memcpy(touched(machine, who, by, {shared, offset}, kPiece, true), piece, kPiece);
        }
      });
      for (uint32_t left = blocks; left != 0; left &= left - 1) {
        const int cta = __builtin_ctz(left);
        Mbarrier& b = machine.async->mbarriers.at({cta, barrier_offset});
        machine.async->make_known(by, b.object);
        b.bytes -= box.bytes();
        machine.counts.tma_bytes += box.bytes();
        machine.async->update(cta, barrier_offset, b, who);
      }
    };
    if (machine.options.late) {
      machine.async->loads.push_back(std::move(o));
    } else {
      o.effect(o);
    }
  });
  return Outcome::kNext;
}

// operands: [map, {coordinates}], [source]
//
// CUTLASS lets a whole warp come here with the same operands. By PTX that is a store by each of the lanes, of the same
// bytes to the same place; it is made once here, and every lane commits it and waits for it.
Outcome store(Context& c) {
  const int coordinates = c.instruction.counts[0] - 1;
  const int leader = __builtin_ctz(c.mask);
  const auto as_leader = [&](int lane) {
    bool same = c.address(0, lane) == c.address(0, leader);
    same = same && c.address(1 + coordinates, lane) == c.address(1 + coordinates, leader);
    for (int d = 0; d < coordinates; ++d) same = same && c.bits(1 + d, lane) == c.bits(1 + d, leader);
    return same;
  };
  Operation of_leader;
  each_lane(c.mask, [&](int lane) {
    if (lane != leader && as_leader(lane)) {
      Operation shared = of_leader;
      c.machine.async->stores[c.machine.agent_of(c.warp, lane)].open.push_back(std::move(shared));
      return;
    }
    const Box box = box_at(c, 0, coordinates, lane);
    const uint64_t from = c.address(1 + coordinates, lane);
    if (from % 128 != 0) c.fault("a TMA source off a 128-byte boundary", lane);
    const uint32_t thread = c.machine.agent_of(c.warp, lane);
    Operation o = c.machine.async->start(thread);
    Machine& machine = c.machine;
    const int self = c.warp.cta->rank;
    const std::string who = c.program.label + ": " + c.instruction.text.substr(0, 90);
    o.effect = [=, &machine](Operation& by) {
      Cta& cta = machine.ctas[self];
      box.each_piece(from, [&](uint64_t offset, uint64_t address, int64_t valid) {
        if (valid <= 0) return;
        const std::byte* piece = touched(machine, who, by, {&cta.shared, offset}, valid, false);
        std::memcpy(touched(machine, who, by, place_of(machine, cta.warps[0], Space::kGlobal, address), valid, true),
                    piece, valid);
      });
      machine.counts.tma_bytes += box.bytes();
    };
    of_leader = o;
    of_leader.effect = nullptr;
    if (!machine.options.late) {
      o.effect(o);
      o.effect = nullptr;
    }
    machine.async->stores[thread].open.push_back(std::move(o));
  });
  return Outcome::kNext;
}

Outcome commit(Context& c) {
  each_lane(c.mask, [&](int lane) { Async::commit(c.machine.async->stores[c.machine.agent_of(c.warp, lane)]); });
  return Outcome::kNext;
}

// .read: until the source has been read. Here a group is read and written at once, as late as that.
Outcome wait(Context& c) {
  each_lane(c.mask, [&](int lane) {
    const uint32_t thread = c.machine.agent_of(c.warp, lane);
    c.machine.async->wait(c.machine.async->stores[thread], c.bits(0, lane), {thread});
  });
  return Outcome::kNext;
}

}  // namespace

void add_tma_ops(OpTable& t) {
  const std::string load_name = "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes";
  t[load_name + ".L2::cache_hint"] = {load<false>};
  t[load_name + ".multicast::cluster.L2::cache_hint"] = {load<true>};
  t["cp.async.bulk.tensor.3d.global.shared::cta.bulk_group"] = {store};
  t["cp.async.bulk.commit_group"] = {commit};
  t["cp.async.bulk.wait_group.read"] = {wait};
}

}  // namespace ptx
