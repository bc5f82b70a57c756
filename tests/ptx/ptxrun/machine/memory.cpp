#include "memory.h"

#include <cstring>

namespace ptx {

Allocation& AddressSpace::add(std::string name, uint64_t size, std::byte* data, bool known) {
  if (size >> (kWindowBits - 1)) throw Fault("an allocation of " + std::to_string(size) + " bytes is too large");
  const uint64_t window = next_++;
  const uint64_t base = (window << kWindowBits) + kOffsetInWindow;
  auto& place = windows_[window];
  place = std::make_unique<Allocation>(std::move(name), base, size, data, known);
  return *place;
}

void AddressSpace::remove(uint64_t address) {
  last_ = nullptr;
  windows_.erase(address >> kWindowBits);
}

Allocation* AddressSpace::find(uint64_t address) const {
  const uint64_t window = address >> kWindowBits;
  if (last_ != nullptr && window == last_window_) return last_;
  const auto found = windows_.find(window);
  if (found == windows_.end()) return nullptr;
  last_window_ = window;
  return last_ = found->second.get();
}

std::byte* AddressSpace::host_place(uint64_t address, uint64_t bytes, bool reads, const std::string& who) {
  Allocation* a = find(address);
  if (a == nullptr) throw Fault(who + ": an address that is in no allocation");
  const uint64_t offset = address - a->base;
  if (offset > a->size || bytes > a->size - offset) {
    throw Fault(who + ": out of bounds of " + a->name + ", " + std::to_string(a->size) + " bytes, by an access of " +
                std::to_string(bytes) + " at " + std::to_string(static_cast<int64_t>(offset)));
  }
  if (reads && bytes != 0 && std::memchr(a->known.data() + offset, 0, bytes) != nullptr) {
    throw Fault(who + ": reads bytes of " + a->name + " that nothing has written");
  }
  return a->data + offset;
}

void AddressSpace::mark_known(uint64_t address, uint64_t bytes) {
  Allocation* a = find(address);
  std::memset(a->known.data() + (address - a->base), 1, bytes);
}

const char* Races::note(Shadow& s, bool write, uint16_t agent, Clock clock, const std::vector<Clock>* seen,
                        const std::vector<Clock>* seen_writes, uint32_t threads) {
  const auto knows = [&](const std::vector<Clock>* of, uint32_t other, Clock at) {
    return other == agent || (of != nullptr && (*of)[other] >= at);
  };
  if (s.write_cluster >= first_cluster) {
    if (s.write_cluster != cluster) return "another block's write";
    const bool by_thread = s.write_agent < threads;
    if (!knows(by_thread ? seen_writes : seen, s.write_agent, s.write_clock)) {
      return by_thread && seen != seen_writes && knows(seen, s.write_agent, s.write_clock)
                 ? "a write that no fence.proxy.async has made visible to the asynchronous proxy"
             : by_thread ? "another thread's write"
                         : "the write of an asynchronous operation";
    }
  }
  const bool was_read = s.read_cluster >= first_cluster;
  if (write) {
    if (was_read) {
      if (s.read_cluster != cluster || s.read_agent == kSeveralClusters) return "another block's read";
      if (s.read_agent == kSeveralReaders) {
        const std::vector<Clock>& all = readers[s.read_clock];
        for (uint32_t other = 0; other < all.size(); ++other) {
          if (all[other] != 0 && !knows(seen, other, all[other])) return "another thread's read";
        }
      } else if (!knows(seen, s.read_agent, s.read_clock)) {
        return s.read_agent < threads ? "another thread's read" : "the read of an asynchronous operation";
      }
    }
    s.write_cluster = cluster, s.write_agent = agent, s.write_clock = clock;
    s.read_cluster = 0;
    return nullptr;
  }
  if (!was_read) {
    s.read_cluster = cluster, s.read_agent = agent, s.read_clock = clock;
  } else if (s.read_cluster != cluster) {
    s.read_cluster = cluster, s.read_agent = kSeveralClusters;
  } else if (s.read_agent == kSeveralReaders) {
    readers[s.read_clock][agent] = clock;
  } else if (s.read_agent != kSeveralClusters) {
    if (knows(seen, s.read_agent, s.read_clock)) {
      s.read_agent = agent, s.read_clock = clock;
    } else {
      std::vector<Clock> both(agents, 0);
      both[s.read_agent] = s.read_clock;
      both[agent] = clock;
      readers.push_back(std::move(both));
      s.read_agent = kSeveralReaders, s.read_clock = static_cast<Clock>(readers.size() - 1);
    }
  }
  return nullptr;
}

}  // namespace ptx
