// C functions, for Python and for the stand-in CUDA runtime.
#include "api.h"

#include <utility>

#include "op_table.h"

namespace ptx {
namespace {

std::map<std::string, std::unique_ptr<Program>>& programs() {
  static std::map<std::string, std::unique_ptr<Program>> all;
  return all;
}

std::string g_fault;
// Asked for a program when it is launched for the first time; 0 if there is none.
int (*g_provide)(const char* name) = nullptr;
std::string g_launches;  // names of launched kernels, a line each

template <typename F>
int guarded(F f) {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    g_fault = error.what();
    return 1;
  }
}

uint64_t filled(Constant& k, uint64_t bits) {
  k.bits = bits;
  k.b64.fill(bits);
  k.b32.fill(static_cast<uint32_t>(bits));
  k.b16.fill(static_cast<uint16_t>(bits));
  k.b8.fill(static_cast<uint8_t>(bits));
  return bits;
}

}  // namespace

Machine& the_machine() {
  static Machine machine;
  return machine;
}

const std::string& last_fault() { return g_fault; }
void set_fault(const std::string& text) { g_fault = text; }

bool launch_by_name(const char* name, const Dim& grid, const Dim& block, const Dim& cluster, uint64_t dynamic_shared,
                    void** arguments) {
  return guarded([&] {
           auto found = programs().find(name);
           if (found == programs().end() && g_provide != nullptr && g_provide(name) != 0) found = programs().find(name);
           if (found == programs().end()) {
             throw Fault(std::string("no PTX for the kernel ") + name + (g_fault.empty() ? "" : ": " + g_fault));
           }
           const Program& program = *found->second;
           g_launches += program.name + "\n";
           Launch launch;
           launch.program = &program;
           launch.grid = grid, launch.block = block, launch.cluster = cluster;
           launch.dynamic_shared = dynamic_shared;
           launch.parameters.resize(program.parameter_bytes);
           for (size_t i = 0; i < program.parameters.size(); ++i) {
             std::memcpy(launch.parameters.data() + program.parameters[i].offset, arguments[i],
                         program.parameters[i].size);
           }
           the_machine().run(launch);
         }) == 0;
}

}  // namespace ptx

using ptx::Operand;

extern "C" {

const char* ptx_fault() { return ptx::g_fault.c_str(); }
void ptx_clear_fault() { ptx::g_fault.clear(); }
void ptx_set_fault(const char* text) { ptx::g_fault = text; }
void ptx_on_missing_program(int (*provide)(const char*)) { ptx::g_provide = provide; }

void ptx_options(int random, int uneven, int late, int perturb, int races, uint64_t seed, uint64_t most_instructions) {
  ptx::the_machine().options = {random != 0, uneven != 0, late != 0, perturb != 0, races != 0, seed, most_instructions};
}

// warp instructions, launches, barriers, mbarrier phases, bytes by TMA, wgmmas
void ptx_counts(uint64_t* six) {
  const ptx::Counts& c = ptx::the_machine().counts;
  const uint64_t values[] = {c.warp_instructions, c.launches, c.barriers, c.mbarrier_phases, c.tma_bytes, c.wgmmas};
  std::copy(std::begin(values), std::end(values), six);
}

// Names of the kernels launched since the last call, a line each.
const char* ptx_launches() {
  static std::string out;
  out = std::exchange(ptx::g_launches, {});
  return out.c_str();
}

// ------------------------------------------------------------------------------------------------ programs

void* ptx_program(const char* name) {
  auto program = std::make_unique<ptx::Program>();
  program->name = name;
  program->label = program->name.size() > 90 ? program->name.substr(0, 90) + "..." : program->name;
  void* handle = program.get();
  ptx::programs()[name] = std::move(program);
  return handle;
}
void ptx_forget(const char* name) { ptx::programs().erase(name); }

int ptx_register(void* handle, const char* name, int width) {
  auto& p = *static_cast<ptx::Program*>(handle);
  p.register_widths.push_back(static_cast<uint8_t>(width));
  p.register_slots.push_back(p.file_bytes);
  p.register_names.emplace_back(name);
  p.file_bytes += width == 0 ? 4 : width * ptx::kLanes;
  p.file_bytes = (p.file_bytes + 7) / 8 * 8;
  const int index = static_cast<int>(p.register_widths.size()) - 1;
  if (name[0] == '%' && std::strchr(name, '.') != nullptr) p.specials[name] = index;
  if (std::string(name) == "%laneid" || std::string(name) == "%cluster_ctarank") p.specials[name] = index;
  return index;
}

void ptx_parameter(void* handle, uint32_t offset, uint32_t size) {
  auto& p = *static_cast<ptx::Program*>(handle);
  p.parameters.push_back({offset, size});
  p.parameter_bytes = std::max(p.parameter_bytes, offset + size);
}

void ptx_shared_bytes(void* handle, uint32_t bytes) { static_cast<ptx::Program*>(handle)->shared_bytes = bytes; }

// `operands` are of three numbers each: kind (Operand::Kind), register (or -1), value (bits, or offset). `counts` says
// how many of them belong to each operand as written. Fails, with the opcode's name, where the machine has no such.
int ptx_instruction(void* handle, const char* opcode, const char* text, int guard, int negated, int target,
                    const int64_t* operands, int n, const int* counts, int n_counts) {
  return ptx::guarded([&] {
    auto& p = *static_cast<ptx::Program*>(handle);
    const auto found = ptx::op_table().find(opcode);
    if (found == ptx::op_table().end()) throw ptx::Fault(std::string("unknown instruction ") + opcode + ": " + text);
    ptx::Instruction i;
    i.run = found->second.run;
    i.together = found->second.together;
    i.space = found->second.space;
    i.count = found->second.count;
    i.opcode = opcode;
    i.text = text;
    i.target = target;
    i.counts.assign(counts, counts + n_counts);
    const auto of_register = [&](Operand& o, int64_t index) {
      o.index = static_cast<uint32_t>(index);
      o.width = p.register_widths.at(index);
      o.slot = p.register_slots.at(index);
    };
    if (guard >= 0) {
      i.guarded = true;
      i.guard_negated = negated != 0;
      i.guard.kind = Operand::kRegister;
      of_register(i.guard, guard);
      if (i.guard.width != 0) throw ptx::Fault(std::string("a guard that is no predicate: ") + text);
    }
    for (int k = 0; k < n; ++k) {
      Operand o;
      o.kind = static_cast<Operand::Kind>(operands[3 * k]);
      o.offset = operands[3 * k + 2];
      if (o.kind == Operand::kConstant) {
        auto constant = std::make_unique<ptx::Constant>();
        ptx::filled(*constant, static_cast<uint64_t>(o.offset));
        o.index = static_cast<uint32_t>(p.constants.size());
        p.constants.push_back(std::move(constant));
      } else if (o.kind == Operand::kRegister || o.kind == Operand::kAddress) {
        of_register(o, operands[3 * k + 1]);
      }
      i.operands.push_back(o);
    }
    if (i.opcode.rfind("wgmma", 0) == 0) p.uses_wgmma = true;
    p.code.push_back(std::move(i));
  });
}

// ------------------------------------------------------------------------------------------------ memory

uint64_t ptx_allocate(const char* name, uint64_t size, void* data, int known) {
  return ptx::the_machine().memory.add(name, size, static_cast<std::byte*>(data), known != 0).base;
}
void ptx_free(uint64_t address) { ptx::the_machine().memory.remove(address); }
// Whether all bytes of an allocation have been written.
int ptx_all_known(uint64_t address) {
  const auto& known = ptx::the_machine().memory.find(address)->known;
  return known.empty() || std::memchr(known.data(), 0, known.size()) == nullptr;
}

// A launch without a host program: `arguments` leads to each parameter's bytes; `sizes` is x, y, z of grid, block and
// cluster.
int ptx_launch(const char* name, const uint32_t* sizes, uint64_t dynamic_shared, void** arguments) {
  return ptx::launch_by_name(name, {sizes[0], sizes[1], sizes[2]}, {sizes[3], sizes[4], sizes[5]},
                             {sizes[6], sizes[7], sizes[8]}, dynamic_shared, arguments)
             ? 0
             : 1;
}

}  // extern "C"
