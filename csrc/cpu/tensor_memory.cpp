// Memory of CPU tensors that is used again after it was freed.
//
// Torch asks for tensors at multiples of 64 bytes. glibc's posix_memalign() looks for a free block that is larger than
// what is asked for by that much, takes the tensor out of its middle and hands both ends back: a block that a tensor
// has left is too small for the next one of the same size, and a process comes to hold up to three times what its
// tensors need. So the room for the alignment is asked for here and stays part of the block. malloc's own settings
// hold.
#include <c10/core/CPUAllocator.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr size_t kAlignment = 64;  // as torch's own (c10/core/alignment.h)

// A tensor's bytes begin at the first multiple of kAlignment behind the block's; before them stands where that is.
void* take(size_t size) {
  if (size == 0) return nullptr;
  void* const block = size <= SIZE_MAX - kAlignment ? std::malloc(size + kAlignment) : nullptr;
  // Worded as torch's own, by which callers know it.
  TORCH_CHECK(block != nullptr, "DefaultCPUAllocator: can't allocate memory: you tried to allocate ", size,
              " bytes. Error code ", ENOMEM, " (", std::strerror(ENOMEM), ")");
  void** const bytes =
      reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(block) + kAlignment) / kAlignment * kAlignment);
  bytes[-1] = block;  // fits, since malloc's blocks are multiples of two pointers
  return bytes;
}

void give_back(void* bytes) {
  if (bytes == nullptr) return;
  c10::profiledCPUMemoryReporter().Delete(bytes);
  std::free(static_cast<void**>(bytes)[-1]);
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

// New CPU tensors of this process are of this memory from now on; those that are there stay where they are.
extern "C" __attribute__((visibility("default"))) void fastdpo_cpu_use_tensor_memory() {
  static TensorMemory memory;
  c10::SetCPUAllocator(&memory);
}
