#include "machine.h"

namespace ptx {

uint64_t Context::bits(int i, int lane) const {
  const Operand& o = operand(i);
  if (o.kind == Operand::kConstant) return program.constants[o.index]->bits;
  if (o.kind != Operand::kRegister) wrong_width(o, 8);
  check_read(o);
  const std::byte* lanes = warp.file + o.slot;
  uint64_t value = 0;
  switch (o.width) {
    case 0:
      wrong_width(o, 8);
    case 2:
      return reinterpret_cast<const uint16_t*>(lanes)[lane];
    case 4:
      return reinterpret_cast<const uint32_t*>(lanes)[lane];
    default:
      std::memcpy(&value, lanes + lane * 8, 8);
      return value;
  }
}

uint64_t Context::address(int i, int lane) const {
  const Operand& o = operand(i);
  if (o.kind == Operand::kAbsolute) return static_cast<uint64_t>(o.offset);
  if (o.kind != Operand::kAddress) fault("an operand that is no address");
  check_read(o);
  if (o.width == 8) {
    return reinterpret_cast<const uint64_t*>(warp.file + o.slot)[lane] + static_cast<uint64_t>(o.offset);
  }
  if (o.width != 4) fault("an address in a register of " + std::to_string(o.width) + " bytes");
  return static_cast<uint32_t>(reinterpret_cast<const uint32_t*>(warp.file + o.slot)[lane] + o.offset);
}

uint64_t Context::uniform(int i, const char* what) const {
  const Operand& o = operand(i);
  const bool is_address = o.kind == Operand::kAddress || o.kind == Operand::kAbsolute;
  const auto value = [&](int lane) { return is_address ? address(i, lane) : bits(i, lane); };
  const uint64_t first = value(__builtin_ctz(mask));
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    if (value(__builtin_ctz(left)) != first) fault(what);
  }
  return first;
}

void Context::undefined(const Operand& o) const {
  const uint32_t missing = mask & ~warp.defined[o.index];
  fault("register " + program.register_names[o.index] + " is read before it is written", __builtin_ctz(missing));
}

void Context::in_flight(const Operand& o) const {
  fault("register " + program.register_names[o.index] + " belongs to a wgmma that has not been waited for");
}

void Context::wrong_width(const Operand& o, size_t width) const {
  fault("operand " + std::to_string(&o - instruction.operands.data()) + " of " + instruction.opcode + " must be " +
        (width == 0 ? std::string("a predicate") : "of " + std::to_string(width * 8) + " bits"));
}

void* Context::sink() {
  alignas(64) thread_local std::byte lanes[kLanes * 8];
  return lanes;
}

}  // namespace ptx
