#include "machine.h"

#include <algorithm>
#include <utility>

#include "async.h"
#include "op_table.h"

namespace ptx {

namespace {

template <typename T>
void pick_order(std::vector<T>& items, std::mt19937_64& dice) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[dice() % i]);
}

}  // namespace

Machine::Machine() : async(std::make_unique<Async>(*this)) {}
Machine::~Machine() = default;

const OpTable& op_table() {
  static const OpTable table = [] {
    OpTable t;
    for (auto add : {add_integer_ops, add_floating_ops, add_directed_ops, add_conversions, add_moves, add_comparisons,
                     add_memory_ops, add_warp_ops, add_control_ops, add_mbarrier_ops, add_tma_ops, add_wgmma_ops}) {
      add(t);
    }
    return t;
  }();
  return table;
}

uint32_t Machine::lanes_of(const Warp& warp) const {
  const int64_t left = static_cast<int64_t>(launch->block.count()) - warp.number * kLanes;
  return left >= kLanes ? kAllLanes : (1u << left) - 1;
}

bool Machine::has_left(size_t rank) const {
  return std::all_of(ctas[rank].warps.begin(), ctas[rank].warps.end(), [](const Warp& w) { return w.groups.empty(); });
}

// ------------------------------------------------------------------------------------------------ a launch

void Machine::run(const Launch& what) {
  launch = &what;
  const Program& program = *what.program;
  const uint64_t clusters = what.grid.count() / what.cluster.count();
  if (what.grid.x % what.cluster.x || what.grid.y % what.cluster.y || what.grid.z % what.cluster.z) {
    throw Fault(program.label + ": a grid that is no whole number of clusters");
  }
  if (what.block.count() == 0 || what.block.count() > 1024) {
    throw Fault(program.label + ": a block of " + std::to_string(what.block.count()) + " threads");
  }
  std::vector<std::byte> parameter_bytes = what.parameters;
  parameters = Allocation("the parameters", uint64_t{1} << AddressSpace::kWindowBits, parameter_bytes.size(),
                          parameter_bytes.data(), true);
  races.start_launch();
  dice.seed(options.seed * 0x9e3779b97f4a7c15u + counts.launches);
  ++counts.launches;
  now = 0;
  std::vector<uint64_t> order(clusters);
  for (uint64_t i = 0; i < clusters; ++i) order[i] = i;
  if (options.random) pick_order(order, dice);
  for (const uint64_t cluster : order) {
    start_cluster(cluster);
    run_cluster();
  }
  ctas.clear();
  launch = nullptr;
}

uint32_t Machine::special(const std::string& name, const Cta& cta, uint32_t thread) const {
  const Dim& b = launch->block;
  const Dim& c = launch->cluster;
  const uint32_t rank = static_cast<uint32_t>(cta.rank);
  const uint32_t tid[3] = {thread % b.x, thread / b.x % b.y, thread / b.x / b.y};
  const uint32_t ntid[3] = {b.x, b.y, b.z};
  const uint32_t nctaid[3] = {launch->grid.x, launch->grid.y, launch->grid.z};
  const uint32_t in_cluster[3] = {rank % c.x, rank / c.x % c.y, rank / c.x / c.y};
  if (name == "%laneid") return thread % kLanes;
  if (name == "%cluster_ctarank") return rank;
  const int axis = name.back() - 'x';
  const std::string what = name.substr(0, name.size() - 2);
  if (what == "%tid") return tid[axis];
  if (what == "%ntid") return ntid[axis];
  if (what == "%ctaid") return cta.index[axis];
  if (what == "%nctaid") return nctaid[axis];
  if (what == "%cluster_ctaid") return in_cluster[axis];
  throw Fault("unknown special register " + name);
}

void Machine::start_cluster(uint64_t number) {
  const Program& program = *launch->program;
  const Dim& size = launch->cluster;
  const Dim clusters{launch->grid.x / size.x, launch->grid.y / size.y, launch->grid.z / size.z};
  const uint32_t at[3] = {static_cast<uint32_t>(number % clusters.x),
                          static_cast<uint32_t>(number / clusters.x % clusters.y),
                          static_cast<uint32_t>(number / clusters.x / clusters.y)};
  const size_t warps = (launch->block.count() + kLanes - 1) / kLanes;
  const uint64_t shared_bytes = program.shared_bytes + launch->dynamic_shared;
  races.start_cluster();
  async->start_cluster();
  ctas.clear();
  ctas.resize(size.count());
  files_.resize(ctas.size() * warps);
  for (size_t rank = 0; rank < ctas.size(); ++rank) {
    Cta& cta = ctas[rank];
    cta.rank = static_cast<int>(rank);
    cta.index[0] = at[0] * size.x + rank % size.x;
    cta.index[1] = at[1] * size.y + rank / size.x % size.y;
    cta.index[2] = at[2] * size.z + rank / size.x / size.y;
    // A pattern that is no plausible number; what has not been written is not read in any case.
    cta.shared_data.assign(shared_bytes, std::byte{0xa5});
    cta.shared = Allocation("shared memory", 0, shared_bytes, cta.shared_data.data(), false);
    cta.warps.resize(warps);
    for (size_t w = 0; w < warps; ++w) {
      Warp& warp = cta.warps[w];
      warp.cta = &cta;
      warp.number = static_cast<int>(w);
      warp.groups = {Group{lanes_of(warp), 0}};
      warp.defined.assign(program.register_widths.size(), 0);
      warp.in_flight.assign(program.register_widths.size(), 0);
      if (program.uses_wgmma) warp.written.assign(program.register_widths.size(), 0);
      auto& file = files_[rank * warps + w];
      if (!file) file = std::make_unique<std::byte[]>(1 << 22);
      if (program.file_bytes > (1 << 22) - 64) throw Fault(program.label + ": too many registers");
      warp.file = file.get() + (64 - reinterpret_cast<uintptr_t>(file.get()) % 64);
      for (const auto& [name, index] : program.specials) {
        auto* lanes = reinterpret_cast<uint32_t*>(warp.file + program.register_slots[index]);
        warp.defined[index] = kAllLanes;
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = special(name, cta, warp.number * kLanes + lane);
      }
    }
  }
  order_warps();
  agents.assign(threads() + kAsyncAgents, Agent{});
  races.agents = static_cast<uint32_t>(agents.size());
  cluster_arrived_.clear();
  cluster_barrier_ = Agent{};
}

// ------------------------------------------------------------------------------------------------ the schedule

// Uneven: fours of warps, which wgmma has for its warp groups, block by block, both in random order.
void Machine::order_warps() {
  constexpr size_t kTogether = 4;
  std::vector<std::vector<std::vector<Warp*>>> blocks;
  for (Cta& cta : ctas) {
    blocks.emplace_back();
    for (Warp& warp : cta.warps) {
      if (warp.number % kTogether == 0) blocks.back().emplace_back();
      blocks.back().back().push_back(&warp);
    }
    if (options.random && options.uneven) pick_order(blocks.back(), dice);
  }
  if (options.random && options.uneven) pick_order(blocks, dice);
  ahead_.clear();
  for (auto& block : blocks) {
    for (auto& warps : block) ahead_.push_back(std::move(warps));
  }
}

void Machine::run_cluster() {
  for (;;) {
    Warp* warp = nullptr;
    size_t group = 0;
    if (pick(warp, group)) {
      run_group(*warp, group);
      continue;
    }
    bool done = true;
    for (const Cta& cta : ctas) {
      for (const Warp& w : cta.warps) done = done && w.groups.empty();
    }
    // Nobody can go on: now something that was left pending as long as it could be must take effect.
    if (async->complete_one()) continue;
    if (!done) deadlock();
    async->finish_cluster();
    return;
  }
}

// In order: the lowest program counter first, which makes diverged lanes meet again as they do on a device. At random:
// any group, which no kernel may depend on the order of. Uneven: of some warps only when none of those before them can
// go on.
bool Machine::pick(Warp*& warp, size_t& group) {
  uint64_t seen = 0;
  int lowest = 0;
  for (const auto& warps : ahead_) {
    if (options.uneven && warp != nullptr) break;
    for (Warp* w : warps) {
      for (size_t g = 0; g < w->groups.size(); ++g) {
        if (w->groups[g].state != Group::kRunning) continue;
        const bool take = options.random ? dice() % ++seen == 0 : warp == nullptr || w->groups[g].pc < lowest;
        if (take) warp = w, group = g, lowest = w->groups[g].pc;
      }
    }
  }
  return warp != nullptr;
}

// Takes in the warp's other groups that are at the same instruction.
void Machine::merge(Warp& warp, size_t& group) {
  for (size_t other = 0; other < warp.groups.size();) {
    Group& from = warp.groups[other];
    Group& into = warp.groups[group];
    const bool joins =
        other != group && from.pc == into.pc && (from.state == Group::kRunning || from.state == Group::kWaitsForLanes);
    if (!joins) {
      ++other;
      continue;
    }
    into.lanes |= from.lanes;
    warp.groups.erase(warp.groups.begin() + static_cast<std::ptrdiff_t>(other));
    if (other < group) --group;
  }
}

void Machine::run_group(Warp& warp, size_t index) {
  const Program& program = *launch->program;
  // In order, to the end of a basic block: then another group may have the lowest program counter.
  uint64_t budget = options.random ? 1 + (dice() & 63) : ~uint64_t{0};
  if (options.random && options.uneven) budget = 1;  // who is ahead goes on as soon as they can
  if (options.random && warp.groups.size() > 1 && (dice() & 1)) merge(warp, index);
  for (; budget > 0; --budget) {
    Group* group = &warp.groups[index];
    if (group->pc >= static_cast<int>(program.code.size()))
      throw Fault(program.label + ": ran past its last instruction");
    const Instruction& i = program.code[group->pc];
    if (warp.groups.size() > 1 && (i.together || !options.random)) {
      merge(warp, index);
      group = &warp.groups[index];
    }
    ++now;
    ++counts.warp_instructions;
    if (options.most_instructions != 0 && now > options.most_instructions) {
      throw Fault(program.label + ": more than " + std::to_string(options.most_instructions) +
                  " instructions, as if it would never end");
    }
    Context c{*this, warp, *group, i, program, group->lanes};
    if (i.guarded) {
      const uint32_t bits = c.predicate(i.guard);
      c.mask &= i.guard_negated ? ~bits : bits;
    }
    if (i.target >= 0) {  // a branch
      const uint32_t taken = c.mask;
      const uint32_t stays = group->lanes & ~taken;
      if (stays == 0) {
        group->pc = i.target;
      } else {
        ++group->pc;
        if (taken != 0) {
          group->lanes = stays;
          Group goes = *group;
          goes.lanes = taken, goes.pc = i.target;
          warp.groups.push_back(goes);
        }
      }
      if (!options.random) return;
      continue;
    }
    if (c.mask == 0) {
      ++group->pc;
      continue;
    }
    if (i.run(c) == Outcome::kStay) return;
    ++warp.groups[index].pc;
    if (!options.random && i.together) return;
  }
}

// ------------------------------------------------------------------------------------------------ barriers

void Machine::synchronise(const std::vector<uint32_t>& of) {
  auto all = std::make_shared<std::vector<Clock>>(agents.size(), 0);
  auto all_async = std::make_shared<std::vector<Clock>>(agents.size(), 0);
  const void* last = nullptr;
  const void* last_async = nullptr;
  for (const uint32_t a : of) {
    if (agents[a].seen.get() != last) join_into(*all, agents[a].seen), last = agents[a].seen.get();
    if (agents[a].seen_by_async.get() != last_async) {
      join_into(*all_async, agents[a].seen_by_async), last_async = agents[a].seen_by_async.get();
    }
  }
  for (const uint32_t a : of) (*all)[a] = agents[a].clock;
  for (const uint32_t a : of) {
    ++agents[a].clock;
    agents[a].seen = all;
    agents[a].seen_by_async = all_async;
  }
}

void Machine::release(uint32_t agent, Agent& object) {
  object.seen = joined(agents[agent].all(agent, agents.size()), object.seen);
  object.seen_by_async = joined(object.seen_by_async, agents[agent].seen_by_async);
  ++agents[agent].clock;
}

void Machine::acquire(uint32_t agent, const Agent& object) {
  agents[agent].seen = joined(agents[agent].seen, object.seen);
  agents[agent].seen_by_async = joined(agents[agent].seen_by_async, object.seen_by_async);
}

void Machine::wake(Group::State state, uint64_t key, bool move_on) {
  for (Cta& cta : ctas) {
    for (Warp& warp : cta.warps) {
      for (Group& group : warp.groups) {
        if (group.state != state || group.key != key) continue;
        group.state = Group::kRunning;
        if (move_on) ++group.pc;
      }
    }
  }
}

void Machine::arrive_at_barrier(Context& c, uint32_t id, uint32_t expected) {
  const uint64_t key = (static_cast<uint64_t>(c.warp.cta->rank) << 32) | id;
  NamedBarrier& barrier = c.warp.cta->barriers[id];
  if (id >= 16) c.fault("barrier " + std::to_string(id) + ": there are 16");
  if (expected == 0 || expected % kLanes != 0) {
    c.fault("barrier " + std::to_string(id) + " for " + std::to_string(expected) +
            " threads, no whole number of warps");
  }
  if (barrier.arrived != 0 && barrier.expected != expected) {
    c.fault("barrier " + std::to_string(id) + " for " + std::to_string(expected) + " threads, and for " +
            std::to_string(barrier.expected) + " elsewhere");
  }
  barrier.expected = expected;
  barrier.arrived += kLanes;
  c.group.state = Group::kAtBarrier;
  c.group.key = key;
  if (barrier.arrived < expected) return;
  ++counts.barriers;
  std::vector<uint32_t> of;
  for (Warp& warp : c.warp.cta->warps) {
    for (Group& group : warp.groups) {
      if (group.state != Group::kAtBarrier || group.key != key) continue;
      each_lane(group.lanes, [&](int lane) { of.push_back(agent_of(warp, lane)); });
    }
  }
  synchronise(of);
  barrier = NamedBarrier{};
  wake(Group::kAtBarrier, key, true);
}

void Machine::arrive_at_cluster_barrier(Context& c, bool releases) {
  each_lane(c.group.lanes, [&](int lane) {
    cluster_arrived_.push_back(agent_of(c.warp, lane));
    if (releases) release(agent_of(c.warp, lane), cluster_barrier_);
    async->publish_initialisations(agent_of(c.warp, lane), cluster_phase_ + 1);
  });
  c.warp.cluster_phase = cluster_phase_ + 1;
  if (cluster_arrived_.size() < threads()) return;
  ++cluster_phase_;
  ++counts.barriers;
  cluster_arrived_.clear();
  wake(Group::kAtClusterBarrier, 0, false);
}

bool Machine::cluster_has_arrived(Context& c) {
  if (c.warp.cluster_phase == 0) c.fault("waits for the cluster without having arrived");
  if (c.warp.cluster_phase > cluster_phase_) {
    c.group.state = Group::kAtClusterBarrier;
    c.group.key = 0;
    return false;
  }
  c.warp.cluster_waited = std::exchange(c.warp.cluster_phase, 0);
  each_lane(c.group.lanes, [&](int lane) { acquire(agent_of(c.warp, lane), cluster_barrier_); });
  return true;
}

bool Machine::gathered(Context& c, uint32_t needed) {
  if (needed & c.warp.exited) c.fault("is for lanes that have left the kernel");
  if (needed & c.group.lanes & ~c.mask) c.fault("is for lanes whose predicate passes it by");
  if ((needed & ~c.group.lanes) == 0) return true;
  c.group.state = Group::kWaitsForLanes;
  return false;
}

void Machine::deadlock() {
  std::string text = "deadlock:";
  int shown = 0;
  for (const Cta& cta : ctas) {
    for (const Warp& warp : cta.warps) {
      for (const Group& group : warp.groups) {
        if (++shown > 6) continue;
        const Instruction& i = launch->program->code[group.pc];
        static const char* kWhat[] = {"runs",
                                      "waits for other lanes",
                                      "waits at a barrier",
                                      "waits for the cluster",
                                      "waits at an mbarrier",
                                      "waits for its warp group"};
        text += " [" + where(cta, warp, &i, -1) + " " + kWhat[group.state] + ", " +
                std::to_string(__builtin_popcount(group.lanes)) + " lanes, " +
                std::to_string(__builtin_popcount(warp.exited)) + " have left]";
      }
    }
  }
  throw Fault(launch->program->label + ": " + text + (shown > 6 ? " and " + std::to_string(shown - 6) + " more" : ""));
}

// ------------------------------------------------------------------------------------------------ words

std::string Machine::where(const Cta& cta, const Warp& warp, const Instruction* instruction, int lane) const {
  std::string text = "block (" + std::to_string(cta.index[0]) + ", " + std::to_string(cta.index[1]) + "), warp " +
                     std::to_string(warp.number);
  if (lane >= 0) text += ", thread " + std::to_string(warp.number * kLanes + lane);
  if (instruction != nullptr) text += ", at `" + instruction->text.substr(0, 120) + "`";
  return text;
}

void Machine::fault(const Context& c, const std::string& what, int lane) const {
  throw Fault(launch->program->label + ": " + what + ": " + where(*c.warp.cta, c.warp, &c.instruction, lane));
}

}  // namespace ptx
