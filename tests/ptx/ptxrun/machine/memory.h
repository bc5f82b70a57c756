// Memory as allocations: what may be touched, what has been written, and by whom.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "clocks.h"
#include "fault.h"

namespace ptx {

// The last accesses of two neighbouring bytes; a cluster's number is 0 where there was none.
struct Shadow {
  uint32_t write_cluster = 0;
  uint32_t read_cluster = 0;
  Clock write_clock = 0;
  Clock read_clock = 0;  // or, of several readers, their place in Races::readers
  uint16_t write_agent = 0;
  uint16_t read_agent = 0;
};
constexpr uint16_t kSeveralReaders = 0xffff;   // of one cluster
constexpr uint16_t kSeveralClusters = 0xfffe;  // have read it in this launch
constexpr int kGranule = 2;                    // the narrowest element that neighbouring threads write

struct Allocation {
  std::string name;
  uint64_t base = 0;  // its address on the device
  uint64_t size = 0;
  std::byte* data = nullptr;
  std::vector<uint8_t> known;  // [size] whether a byte has ever been written
  std::vector<Shadow> shadow;  // [size / kGranule], once touched

  Allocation() = default;
  Allocation(std::string name_, uint64_t base_, uint64_t size_, std::byte* data_, bool known_)
      : name(std::move(name_)), base(base_), size(size_), data(data_), known(size_, known_) {}
};

// Every allocation has a window of addresses to itself, so that an address that runs out of one never lands in another.
class AddressSpace {
 public:
  static constexpr int kWindowBits = 32;
  static constexpr uint64_t kOffsetInWindow = 1
                                              << 16;  // cudaMalloc's alignment and more; and no small address is valid

  Allocation& add(std::string name, uint64_t size, std::byte* data, bool known);
  void remove(uint64_t address);
  Allocation* find(uint64_t address) const;  // null where there is none
  // The host's place of `bytes` bytes of device memory, for the stand-ins of CUDA's own libraries. Throws Fault as a
  // kernel's access would: `reads` what was never written, or out of bounds.
  std::byte* host_place(uint64_t address, uint64_t bytes, bool reads, const std::string& who);
  // That they were written.
  void mark_known(uint64_t address, uint64_t bytes);

 private:
  std::map<uint64_t, std::unique_ptr<Allocation>> windows_;
  uint64_t next_ = 16;
  mutable uint64_t last_window_ = 0;
  mutable Allocation* last_ = nullptr;
};

// The rules of clocks.h on shadows.
struct Races {
  uint32_t cluster = 0;        // that runs
  uint32_t first_cluster = 0;  // of this launch: what earlier launches did is in order
  uint32_t agents = 0;         // of the cluster
  std::deque<std::vector<Clock>> readers;

  void start_launch() { first_cluster = cluster + 1; }
  void start_cluster() {
    ++cluster;
    readers.clear();
  }
  // What an access by `agent` races with, or null. `seen` is what orders it after others' accesses; `seen_writes`, what
  // orders it after generic writes, where that is another thing: for an asynchronous operation.
  const char* note(Shadow& s, bool write, uint16_t agent, Clock clock, const std::vector<Clock>* seen,
                   const std::vector<Clock>* seen_writes, uint32_t threads);
};

}  // namespace ptx
