// Memory of CPU tensors that is used again after it was freed.
//
// Torch asks for tensors at multiples of 64 bytes. glibc's posix_memalign() looks for a free block that is larger than
// what is asked for by that much, takes the tensor out of its middle and hands both ends back: a block that a tensor
// has left is too small for the next one of the same size, and a process comes to hold up to three times what its
// tensors need. To hand every block back to the system at once needs no more than that, but fresh pages cost a training
// on small tensors a third of its time. Here large blocks that were freed are kept for tensors of about their size, and
// no more of them than what all tensors together have needed at once before.
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {

constexpr size_t kAlignment = 64;     // as torch's own (c10/core/alignment.h)
constexpr size_t kLarge = 128 << 10;  // from here on blocks are mappings of their own
constexpr size_t kPage = 4096;
constexpr size_t kWaste = 8;   // a block may be larger than what is asked for by an eighth
constexpr size_t kSlack = 16;  // and all blocks together than the most that was needed, by a sixteenth

// Stands directly before a tensor's bytes.
struct Header {
  void* block;
  size_t size;  // of a mapping; 0 for a block of malloc's
};
static_assert(sizeof(Header) <= kAlignment);

class Mappings {
 public:
  // Of at least so many bytes, with its size; nullptr where the system has none.
  Header take(size_t bytes) {
    const size_t size = (bytes + kPage - 1) / kPage * kPage;
    const std::lock_guard lock(mutex);
    const auto found = idle_.lower_bound(size);
    if (found != idle_.end() && found->first <= size + size / kWaste) {
      const Header taken{found->second.block, found->first};
      forget(found);
      grow(taken.size);
      return taken;
    }
    const size_t most = std::max(most_, live_ + size);
    while (!idle_.empty() && live_ + idle_bytes_ + size > most + most / kSlack) unmap_oldest();
    void* block = map(size);
    while (block == nullptr && !idle_.empty()) {
      unmap_oldest();
      block = map(size);
    }
    if (block != nullptr) grow(size);
    return {block, size};
  }

  void give_back(Header mapping) {
    const std::lock_guard lock(mutex);
    live_ -= mapping.size;
    idle_bytes_ += mapping.size;
    const auto place = idle_.emplace(mapping.size, Idle{mapping.block, ++clock_});
    by_age_.emplace(clock_, place);
  }

  std::mutex mutex;

 private:
  struct Idle {
    void* block;
    uint64_t age;
  };
  using Place = std::multimap<size_t, Idle>::iterator;

  static void* map(size_t size) {
    void* const block = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return block == MAP_FAILED ? nullptr : block;
  }

  void grow(size_t size) {
    live_ += size;
    most_ = std::max(most_, live_);
  }

  void forget(Place place) {
    idle_bytes_ -= place->first;
    by_age_.erase(place->second.age);
    idle_.erase(place);
  }

  void unmap_oldest() {
    const Place place = by_age_.begin()->second;
    munmap(place->second.block, place->first);
    forget(place);
  }

  std::multimap<size_t, Idle> idle_;  // by size
  std::map<uint64_t, Place> by_age_;
  uint64_t clock_ = 0;
  size_t live_ = 0, idle_bytes_ = 0, most_ = 0;
};

// Never destroyed: tensors are freed until the very end of a process.
Mappings& mappings() {
  static Mappings* const kMappings = new Mappings;
  return *kMappings;
}

// A tensor's bytes begin at the first multiple of kAlignment that leaves room for the header.
void* take(size_t size) {
  if (size == 0) return nullptr;
  Header header{nullptr, 0};
  if (size <= SIZE_MAX / 2) {
    if (size >= kLarge) header = mappings().take(size + kAlignment);
    if (header.block == nullptr) header = {std::malloc(size + 2 * kAlignment), 0};
  }
  // Worded as torch's own, by which callers know it.
  TORCH_CHECK(header.block != nullptr, "DefaultCPUAllocator: can't allocate memory: you tried to allocate ", size,
              " bytes. Error code ", ENOMEM, " (", std::strerror(ENOMEM), ")");
  const uintptr_t first = reinterpret_cast<uintptr_t>(header.block) + sizeof(Header);
  void* const bytes = reinterpret_cast<void*>((first + kAlignment - 1) / kAlignment * kAlignment);
  static_cast<Header*>(bytes)[-1] = header;
  return bytes;
}

void give_back(void* bytes) {
  if (bytes == nullptr) return;
  c10::profiledCPUMemoryReporter().Delete(bytes);
  const Header header = static_cast<Header*>(bytes)[-1];
  header.size == 0 ? std::free(header.block) : mappings().give_back(header);
}

class TensorMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    void* const bytes = take(size);
    c10::profiledCPUMemoryReporter().New(bytes, size);
    return {bytes, bytes, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};

}  // namespace

// New CPU tensors of this process are of this memory from now on, and those that are there stay where they are. Tells
// whether it is so.
extern "C" __attribute__((visibility("default"))) bool fastdpo_cpu_use_tensor_memory() {
  static TensorMemory memory;
  // A process that is forked while a thread of its parent is in here would wait for that thread for ever.
  static const bool kForks = pthread_atfork([] { mappings().mutex.lock(); }, [] { mappings().mutex.unlock(); },
                                            [] { mappings().mutex.unlock(); }) == 0;
  if (kForks) c10::SetCPUAllocator(&memory);
  return kForks;
}
