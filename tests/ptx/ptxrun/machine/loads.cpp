// ld and st: every access checked against its allocation, for bytes that were never written, and for races.
#include "lanes.h"
#include "spaces.h"

namespace ptx {

Place place_of(Machine& machine, const Warp& warp, Space space, uint64_t address) {
  switch (space) {
    case Space::kParameters:
      return {&machine.parameters, address};
    case Space::kShared: {
      const uint64_t rank = address >> kRankShift;
      const uint64_t offset = address & ((uint64_t{1} << kRankShift) - 1);
      if (rank > machine.ctas.size()) return {nullptr, 0};
      return {rank == 0 ? &warp.cta->shared : &machine.ctas[rank - 1].shared, offset};
    }
    default: {
      if (address >> AddressSpace::kWindowBits == 1) return {&machine.parameters, address - kParameterWindow};
      Allocation* a = machine.memory.find(address);
      return {a, a == nullptr ? 0 : address - a->base};
    }
  }
}

Touched touch(Machine& machine, Place place, uint64_t bytes, bool write, const Accessor& by) {
  Allocation* a = place.allocation;
  if (a == nullptr) return {nullptr, "an address that is in no allocation"};
  if (place.offset >= a->size || bytes > a->size - place.offset) {
    return {nullptr, "out of bounds of " + a->name + ", " + std::to_string(a->size) + " bytes, by " +
                         (write ? "a store" : "a load") + " of " + std::to_string(bytes) + " at " +
                         std::to_string(static_cast<int64_t>(place.offset))};
  }
  uint8_t* known = a->known.data() + place.offset;
  if (write) {
    std::memset(known, 1, bytes);
  } else {
    for (uint64_t i = 0; i < bytes; ++i) {
      if (known[i] == 0) return {nullptr, "a load of bytes of " + a->name + " that nothing has written"};
    }
  }
  if (machine.options.races && a != &machine.parameters) {
    if (a->shadow.empty()) a->shadow.resize((a->size + kGranule - 1) / kGranule);
    const uint64_t last = (place.offset + bytes - 1) / kGranule;
    for (uint64_t g = place.offset / kGranule; g <= last; ++g) {
      const char* with = machine.races.note(a->shadow[g], write, static_cast<uint16_t>(by.agent), by.clock, by.seen,
                                            by.seen_writes, machine.threads());
      if (with != nullptr) {
        return {nullptr, std::string("a race in ") + a->name + ": " + (write ? "a write" : "a read") + " after " +
                             with + ", at byte " + std::to_string(g * kGranule)};
      }
    }
  }
  return {a->data + place.offset, {}};
}

namespace {

struct Access {
  Context& c;
  Space space;
  int width;  // of an element
  int count;
  bool write;

  std::byte* at(int address_operand, int lane) const {
    const uint64_t address = c.address(address_operand, lane);
    const uint64_t bytes = static_cast<uint64_t>(width) * count;
    if (address % bytes != 0) {
      c.fault("a misaligned access of " + std::to_string(bytes) + " bytes at ..." + std::to_string(address % 256),
              lane);
    }
    Machine& m = c.machine;
    const uint32_t self = m.agent_of(c.warp, lane);
    const Agent& agent = m.agents[self];
    const Touched t = touch(m, place_of(m, c.warp, space, address), bytes, write,
                            {self, agent.clock, agent.seen.get(), agent.seen.get()});
    if (t.bytes == nullptr) c.fault(t.wrong, lane);
    return t.bytes;
  }
};

// The destination may be wider than the element: signed elements are extended by their sign, others by zeros.
template <typename Element, typename Register>
void load_lanes(const Access& access, int count) {
  Context& c = access.c;
  if (count > 4) __builtin_unreachable();
  Element values[4][kLanes];
  each_lane(c.mask, [&](int lane) {
    const std::byte* from = access.at(count, lane);
    for (int i = 0; i < count; ++i) std::memcpy(&values[i][lane], from + i * sizeof(Element), sizeof(Element));
  });
  for (int i = 0; i < count; ++i) {
    Register* d = c.out<Register>(i);
    each_lane(c.mask, [&](int lane) {
      if constexpr (std::is_signed_v<Element>) {
        d[lane] = static_cast<Register>(static_cast<int64_t>(values[i][lane]));
      } else {
        d[lane] = static_cast<Register>(values[i][lane]);
      }
    });
  }
}

template <typename Element>
Outcome load(Context& c) {
  const int count = c.instruction.count;
  const Access access{c, static_cast<Space>(c.instruction.space), sizeof(Element), count, false};
  const Operand& to = c.operand(0);
  if (to.kind == Operand::kRegister && to.width < sizeof(Element)) c.fault("a register narrower than what is loaded");
  switch (to.width) {
    case 2:
      if constexpr (sizeof(Element) <= 2) load_lanes<Element, uint16_t>(access, count);
      break;
    case 4:
      if constexpr (sizeof(Element) <= 4) load_lanes<Element, uint32_t>(access, count);
      break;
    case 8:
      load_lanes<Element, uint64_t>(access, count);
      break;
    default:
      c.fault("a register that cannot be loaded into");
  }
  return Outcome::kNext;
}

template <typename Element>
Outcome store(Context& c) {
  const int count = c.instruction.count;
  const Access access{c, static_cast<Space>(c.instruction.space), sizeof(Element), count, true};
  for (int i = 0; i < count; ++i) {
    const Operand& o = c.operand(1 + i);
    if (o.kind == Operand::kRegister && o.width < sizeof(Element)) c.fault("a register narrower than what is stored");
  }
  each_lane(c.mask, [&](int lane) {
    std::byte* to = access.at(0, lane);
    for (int i = 0; i < count; ++i) {
      const Element value = static_cast<Element>(c.bits(1 + i, lane));
      std::memcpy(to + i * sizeof(Element), &value, sizeof(Element));
    }
  });
  return Outcome::kNext;
}

template <typename Element>
void add_type(OpTable& t, const std::string& type) {
  for (uint8_t count = 1; count <= 4 && count * sizeof(Element) <= 16; count *= 2) {
    const std::string suffix = (count == 1 ? "." : ".v" + std::to_string(count) + ".") + type;
    const auto add = [&](const char* space_name, Space space, bool stores) {
      t["ld" + std::string(space_name) + suffix] = {load<Element>, false, static_cast<uint8_t>(space), count};
      if (stores)
        t["st" + std::string(space_name) + suffix] = {store<Element>, false, static_cast<uint8_t>(space), count};
    };
    add(".param", Space::kParameters, false);
    add(".global", Space::kGlobal, true);
    add(".shared", Space::kShared, true);
    // volatile: the compiler may not leave it out or move it; the access itself is like any other.
    add(".volatile.shared", Space::kShared, true);
  }
}

}  // namespace

void add_memory_ops(OpTable& t) {
  for (const char* type : {"u8", "b8"}) add_type<uint8_t>(t, type);
  add_type<int8_t>(t, "s8");
  for (const char* type : {"u16", "b16"}) add_type<uint16_t>(t, type);
  add_type<int16_t>(t, "s16");
  for (const char* type : {"u32", "b32", "f32"}) add_type<uint32_t>(t, type);
  add_type<int32_t>(t, "s32");
  for (const char* type : {"u64", "s64", "b64", "f64"}) add_type<uint64_t>(t, type);
}

}  // namespace ptx
