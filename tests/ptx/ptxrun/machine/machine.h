// The machine: a cluster of blocks at a time, warps of 32 lanes, groups of lanes that are at one instruction.
#pragma once

#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "clocks.h"
#include "fault.h"
#include "memory.h"
#include "program.h"

namespace ptx {

struct Cta;
struct Async;

// Lanes of a warp that are at the same instruction.
struct Group {
  enum State : uint8_t { kRunning, kWaitsForLanes, kAtBarrier, kAtClusterBarrier, kAtMbarrier, kAtWarpGroup };
  uint32_t lanes = 0;
  int pc = 0;
  State state = kRunning;
  uint64_t key = 0;  // of the barrier or mbarrier waited for
};

struct Warp {
  Cta* cta = nullptr;
  int number = 0;  // in its block
  std::vector<Group> groups;
  uint32_t exited = 0;
  std::byte* file = nullptr;       // the registers: each 32 lanes of its width; a predicate is 32 bits
  std::vector<uint32_t> defined;   // [registers] the lanes that have been written
  std::vector<uint64_t> written;   // [registers] when; kept where wgmma asks for it
  std::vector<uint8_t> in_flight;  // [registers] belongs to a wgmma that has not been waited for
  bool any_in_flight = false;
  uint64_t fenced = 0;          // the last wgmma.fence
  uint64_t cluster_phase = 0;   // that its arrival at the cluster's barrier was for
  uint64_t cluster_waited = 0;  // the last phase of the cluster's barrier that it has waited for
  std::unique_ptr<std::byte[]> storage;
};

struct NamedBarrier {
  uint32_t expected = 0;
  uint32_t arrived = 0;
};

struct Cta {
  int rank = 0;  // in its cluster
  uint32_t index[3] = {};
  std::vector<Warp> warps;
  Allocation shared;
  std::vector<std::byte> shared_data;
  std::unordered_map<uint64_t, NamedBarrier> barriers;
};

struct Dim {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

struct Launch {
  const Program* program = nullptr;
  Dim grid, block, cluster;
  uint64_t dynamic_shared = 0;
  std::vector<std::byte> parameters;
};

struct Options {
  bool random = false;   // schedule: random groups of random warps, blocks in random order; else the lowest first
  bool uneven = false;   // at random, but that blocks, and in them fours of warps, run ahead as far as they can
  bool late = false;     // asynchronous operations take effect as late as the waits for them allow
  bool perturb = false;  // .approx instructions err by what PTX allows them
  bool races = true;
  uint64_t seed = 0;
  uint64_t most_instructions = 0;  // of a launch; 0 for no limit. A mutant may loop for ever
};

struct Counts {
  uint64_t warp_instructions = 0;
  uint64_t launches = 0;
  uint64_t barriers = 0;
  uint64_t mbarrier_phases = 0;
  uint64_t tma_bytes = 0;
  uint64_t wgmmas = 0;
};

// Asynchronous operations get these agents beside the threads, in turn.
constexpr uint32_t kAsyncAgents = 96;

class Machine {
 public:
  Machine();
  ~Machine();

  AddressSpace memory;
  Options options;
  Counts counts;

  void run(const Launch& launch);

  // ------------------------------------------------------------------------------ for the instructions
  const Launch* launch = nullptr;
  std::vector<Cta> ctas;  // of the cluster that runs
  std::vector<Agent> agents;
  Races races;
  Allocation parameters;
  uint64_t now = 0;  // counts instructions of the launch
  std::mt19937_64 dice;
  std::unique_ptr<Async> async;

  uint32_t threads() const { return static_cast<uint32_t>(ctas.size() * launch->block.count()); }
  uint32_t agent_of(const Warp& warp, int lane) const {
    return static_cast<uint32_t>(warp.cta->rank * launch->block.count()) + warp.number * kLanes + lane;
  }
  uint32_t lanes_of(const Warp& warp) const;  // that the warp was started with
  bool has_left(size_t rank) const;           // all threads of the cluster's block

  [[noreturn]] void fault(const Context& c, const std::string& what, int lane = -1) const;

  // Makes the agents of a barrier know what each of them knows.
  void synchronise(const std::vector<uint32_t>& of);
  // A thread makes what it knows known through `object`, or learns what the object knows.
  void release(uint32_t agent, Agent& object);
  void acquire(uint32_t agent, const Agent& object);

  // Wakes the groups that wait in this state for this key. `move_on`: they continue behind the instruction.
  void wake(Group::State state, uint64_t key, bool move_on);

  void arrive_at_barrier(Context& c, uint32_t id, uint32_t expected);
  void arrive_at_cluster_barrier(Context& c, bool releases);
  bool cluster_has_arrived(Context& c);  // else the group waits
  // Whether all of `needed` are here; else the group waits for them, and there is a fault if they cannot come.
  bool gathered(Context& c, uint32_t needed);

 private:
  void start_cluster(uint64_t number);
  uint32_t special(const std::string& name, const Cta& cta, uint32_t thread) const;  // the register's value
  void run_cluster();
  bool pick(Warp*& warp, size_t& group);
  void order_warps();
  void run_group(Warp& warp, size_t group);
  void merge(Warp& warp, size_t& group);
  [[noreturn]] void deadlock();
  std::string where(const Cta& cta, const Warp& warp, const Instruction* instruction, int lane) const;

  std::vector<uint32_t> cluster_arrived_;
  Agent cluster_barrier_;
  uint64_t cluster_phase_ = 0;
  std::vector<std::unique_ptr<std::byte[]>> files_;
  std::vector<std::vector<Warp*>> ahead_;  // the cluster's warps: those in front first, where the schedule is uneven
};

// What an instruction sees.
struct Context {
  Machine& machine;
  Warp& warp;
  Group& group;
  const Instruction& instruction;
  const Program& program;
  uint32_t mask;  // the lanes of the group whose guard holds

  const Operand& operand(int i) const { return instruction.operands[i]; }
  int size() const { return static_cast<int>(instruction.operands.size()); }

  void check_read(const Operand& o) const {
    if ((warp.defined[o.index] & mask) != mask) undefined(o);
    if (warp.any_in_flight && warp.in_flight[o.index]) in_flight(o);
  }

  // Lanes of operand i as T, of the operand's own width.
  template <typename T>
  const T* in(int i) const {
    const Operand& o = operand(i);
    if (o.kind == Operand::kConstant) {
      const Constant& k = *program.constants[o.index];
      if constexpr (sizeof(T) == 8) return reinterpret_cast<const T*>(k.b64.data());
      if constexpr (sizeof(T) == 4) return reinterpret_cast<const T*>(k.b32.data());
      if constexpr (sizeof(T) == 2) return reinterpret_cast<const T*>(k.b16.data());
      if constexpr (sizeof(T) == 1) return reinterpret_cast<const T*>(k.b8.data());
    }
    if (o.kind != Operand::kRegister || o.width != sizeof(T)) wrong_width(o, sizeof(T));
    check_read(o);
    return reinterpret_cast<const T*>(warp.file + o.slot);
  }

  // Where operand i's lanes are written. The lanes of `mask` must be written, and no others.
  template <typename T>
  T* out(int i) const {
    const Operand& o = operand(i);
    if (o.kind == Operand::kSink) return reinterpret_cast<T*>(sink());
    if (o.kind != Operand::kRegister || o.width != sizeof(T)) wrong_width(o, sizeof(T));
    define(o);
    return reinterpret_cast<T*>(warp.file + o.slot);
  }
  void define(const Operand& o) const {
    if (warp.any_in_flight && warp.in_flight[o.index]) in_flight(o);
    warp.defined[o.index] |= mask;
    if (program.uses_wgmma) warp.written[o.index] = machine.now;
  }

  // Predicates are bits, a lane each.
  uint32_t in_predicate(int i) const {
    const Operand& o = operand(i);
    if (o.kind == Operand::kConstant) return program.constants[o.index]->bits != 0 ? kAllLanes : 0;
    return predicate(o);
  }
  uint32_t predicate(const Operand& o) const {
    if (o.kind != Operand::kRegister || o.width != 0) wrong_width(o, 0);
    check_read(o);
    uint32_t bits;
    std::memcpy(&bits, warp.file + o.slot, sizeof(bits));
    return bits;
  }
  void out_predicate(int i, uint32_t bits) const {
    const Operand& o = operand(i);
    if (o.kind == Operand::kSink) return;
    if (o.kind != Operand::kRegister || o.width != 0) wrong_width(o, 0);
    define(o);
    uint32_t old;
    std::memcpy(&old, warp.file + o.slot, sizeof(old));
    bits = (bits & mask) | (old & ~mask);
    std::memcpy(warp.file + o.slot, &bits, sizeof(bits));
  }

  // Lane `lane` of operand i, of whatever width, its high bits zeros.
  uint64_t bits(int i, int lane) const;
  // The address in operand i, of one lane.
  uint64_t address(int i, int lane) const;
  // A value that must be the same in all lanes of `mask`, or a fault with `what` in it.
  uint64_t uniform(int i, const char* what) const;

  [[noreturn]] void fault(const std::string& what, int lane = -1) const { machine.fault(*this, what, lane); }

 private:
  [[noreturn]] void undefined(const Operand& o) const;
  [[noreturn]] void in_flight(const Operand& o) const;
  [[noreturn]] void wrong_width(const Operand& o, size_t width) const;
  static void* sink();
};

// Calls f(lane) for the lanes of a mask. All of them, the common case, is a loop that a compiler makes vectors of.
template <typename F>
inline void each_lane(uint32_t mask, F f) {
  if (mask == kAllLanes) {
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (; mask != 0; mask &= mask - 1) f(__builtin_ctz(mask));
  }
}

}  // namespace ptx
