// Large pages for large new tensors.
#pragma once

#include <ATen/core/Tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace fastdpo::cpu {

// Asks the kernel to back a tensor that nobody has written to yet with large pages. A tensor of hundreds of MB is a new
// mapping on every call, and its first touch, 4 KB at a time, costs about a tenth of the op. Advice only: where it is
// not taken nothing changes.
inline void prefer_huge_pages(const at::Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + tensor.numel() * tensor.element_size()) / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fastdpo::cpu
