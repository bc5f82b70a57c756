// Opcodes, in full, and what runs them. An opcode that is not here is refused by name: nothing is guessed from a part
// of it.
#pragma once

#include <string>
#include <unordered_map>

#include "program.h"

namespace ptx {

struct Op {
  Handler run = nullptr;
  // A .sync instruction: whichever lanes come here wait for each other, by the mask it names or by the whole warp.
  bool together = false;
  // Of a load or store: which memory (Space), and how many elements.
  uint8_t space = 0;
  uint8_t count = 1;
};

using OpTable = std::unordered_map<std::string, Op>;

void add_integer_ops(OpTable& table);
void add_floating_ops(OpTable& table);
void add_directed_ops(OpTable& table);
void add_conversions(OpTable& table);
void add_moves(OpTable& table);
void add_comparisons(OpTable& table);
void add_memory_ops(OpTable& table);
void add_warp_ops(OpTable& table);
void add_control_ops(OpTable& table);
void add_mbarrier_ops(OpTable& table);
void add_tma_ops(OpTable& table);
void add_wgmma_ops(OpTable& table);

const OpTable& op_table();

}  // namespace ptx
