// A kernel as the machine runs it: registers have places, labels are numbers, constants stand in every lane.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "fault.h"

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct Operand {
  enum Kind : uint8_t {
    kRegister,
    kConstant,
    kAddress,   // [base + offset]
    kAbsolute,  // [offset]
    kSink       // _: a result that is not wanted
  };
  Kind kind = kSink;
  uint8_t width = 0;   // of the register, or an address's base, in bytes; 0 for a predicate
  uint32_t index = 0;  // of the register or the constant
  uint32_t slot = 0;   // where lane 0 of the register lies in the warp's file
  int64_t offset = 0;
};

// A constant in every lane, in every width that an instruction may read it in.
struct Constant {
  uint64_t bits = 0;
  alignas(64) std::array<uint64_t, kLanes> b64;
  alignas(64) std::array<uint32_t, kLanes> b32;
  alignas(64) std::array<uint16_t, kLanes> b16;
  alignas(64) std::array<uint8_t, kLanes> b8;
};

enum class Outcome {
  kNext,  // goes on behind the instruction
  kStay   // the group waits, or was sent elsewhere: its program counter is not touched
};

struct Context;
using Handler = Outcome (*)(Context&);

struct Instruction {
  Handler run = nullptr;
  bool guarded = false;
  bool guard_negated = false;
  bool together = false;  // as the op table has it, and what follows
  uint8_t space = 0;
  uint8_t count = 1;
  Operand guard;
  std::vector<Operand> operands;  // of lists in braces, one by one
  std::vector<int> counts;        // how many of `operands` belong to each operand as written
  int target = -1;
  std::string opcode;
  std::string text;
};

struct Parameter {
  uint32_t offset;
  uint32_t size;
};

struct Program {
  std::string label;  // what messages call it
  std::string name;
  std::vector<Instruction> code;
  std::vector<uint8_t> register_widths;  // 0 for a predicate
  std::vector<uint32_t> register_slots;
  std::vector<std::string> register_names;
  uint32_t file_bytes = 0;  // of a warp's registers
  std::vector<std::unique_ptr<Constant>> constants;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  uint32_t shared_bytes = 0;                 // static; dynamic shared memory starts behind
  std::map<std::string, uint32_t> specials;  // registers such as %tid.x that the machine sets -> register
  bool uses_wgmma = false;
};

}  // namespace ptx
