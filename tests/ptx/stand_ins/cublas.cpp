// cuBLAS for the CPU, as csrc/cuda/products.cpp calls it: sums in float32 (float64), operands cut to TF32 where that is
// asked for, which is the most that a device may make of it. Reads and writes are checked as a kernel's are.
#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "api.h"
#include "device.h"

namespace {

enum : int { kR32F = 0, kR64F = 1, kR16F = 2, kR16BF = 14 };  // cudaDataType
constexpr int kFastTf32 = 77;                                 // cublasComputeType_t
constexpr int kTranspose = 1;                                 // cublasOperation_t

int g_math_mode = 0;

int size_of(int type) { return type == kR64F ? 8 : type == kR32F ? 4 : 2; }

template <typename T>
T read_as(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof(value));
  return value;
}

double load(const std::byte* at, int type) {
  switch (type) {
    case kR64F:
      return read_as<double>(at);
    case kR32F:
      return read_as<float>(at);
    case kR16BF:
      return std::bit_cast<float>(static_cast<uint32_t>(read_as<uint16_t>(at)) << 16);
    case kR16F:
      return static_cast<double>(read_as<_Float16>(at));
    default:
      throw ptx::Fault("cublasGemmEx: a type that the stand-in has not");
  }
}

void store(std::byte* at, int type, double value) {
  const auto as_float = static_cast<float>(value);
  if (type == kR64F) {
    std::memcpy(at, &value, 8);
  } else if (type == kR32F) {
    std::memcpy(at, &as_float, 4);
  } else if (type == kR16BF) {
    const auto bits = std::bit_cast<uint32_t>(as_float);
    const uint16_t rounded =
        as_float != as_float ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    std::memcpy(at, &rounded, 2);
  } else {
    const auto rounded = static_cast<_Float16>(as_float);
    std::memcpy(at, &rounded, 2);
  }
}

// op(X) [rows, columns] as numbers, from column-major memory.
template <typename Sum>
std::vector<Sum> operand(const void* data, int type, int stride, bool transposed, int rows, int columns, bool tf32) {
  auto& memory = ptx::the_machine().memory;
  const int lines = transposed ? rows : columns;
  const int length = transposed ? columns : rows;
  if (stride < length) throw ptx::Fault("cublasGemmEx: a leading dimension below the matrix's own");
  std::vector<Sum> out(static_cast<size_t>(rows) * columns);
  for (int line = 0; line < lines; ++line) {
    const uint64_t address = reinterpret_cast<uint64_t>(data) + static_cast<uint64_t>(line) * stride * size_of(type);
    const std::byte* from =
        memory.host_place(address, static_cast<uint64_t>(length) * size_of(type), true, "cublasGemmEx");
    for (int i = 0; i < length; ++i) {
      auto value = static_cast<Sum>(load(from + static_cast<size_t>(i) * size_of(type), type));
      if (tf32) value = std::bit_cast<float>(std::bit_cast<uint32_t>(static_cast<float>(value)) & ~0x1fffu);
      const size_t row = transposed ? line : i, column = transposed ? i : line;
      out[row * columns + column] = value;
    }
  }
  return out;
}

template <typename Sum>
void multiply(bool a_transposed, bool b_transposed, int m, int n, int k, const void* a, int a_type, int lda,
              const void* b, int b_type, int ldb, Sum beta, void* c, int c_type, int ldc, bool tf32) {
  auto& memory = ptx::the_machine().memory;
  const std::vector<Sum> left = operand<Sum>(a, a_type, lda, a_transposed, m, k, tf32);
  const std::vector<Sum> right = operand<Sum>(b, b_type, ldb, b_transposed, k, n, tf32);
  std::vector<Sum> column(m);
  for (int j = 0; j < n; ++j) {
    const uint64_t address = reinterpret_cast<uint64_t>(c) + static_cast<uint64_t>(j) * ldc * size_of(c_type);
    const uint64_t bytes = static_cast<uint64_t>(m) * size_of(c_type);
    std::byte* to = memory.host_place(address, bytes, beta != 0, "cublasGemmEx");
    for (int i = 0; i < m; ++i)
      column[i] = beta != 0 ? beta * static_cast<Sum>(load(to + i * size_of(c_type), c_type)) : 0;
    for (int i = 0; i < m; ++i) {
      Sum sum = 0;
      for (int d = 0; d < k; ++d) sum += left[static_cast<size_t>(i) * k + d] * right[static_cast<size_t>(d) * n + j];
      column[i] += sum;
    }
    for (int i = 0; i < m; ++i) store(to + i * size_of(c_type), c_type, column[i]);
    memory.mark_known(address, bytes);
  }
}

}  // namespace

extern "C" {

int torch_get_current_cuda_blas_handle(void** handle) {
  *handle = ptx::the_stream();
  return 0;
}
int cublasGetMathMode(void*, int* mode) {
  *mode = g_math_mode;
  return 0;
}
int cublasSetMathMode(void*, int mode) {
  g_math_mode = mode;
  return 0;
}

int cublasGemmEx(void*, int transa, int transb, int m, int n, int k, const void* alpha, const void* a, int a_type,
                 int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc,
                 int compute_type, int) {
  try {
    ptx::forget_freed_tensors();
    const bool ta = transa == kTranspose, tb = transb == kTranspose, tf32 = compute_type == kFastTf32;
    const bool in_float64 = a_type == kR64F;
    const double one = in_float64 ? *static_cast<const double*>(alpha) : *static_cast<const float*>(alpha);
    if (one != 1) throw ptx::Fault("cublasGemmEx: an alpha that the stand-in has not");
    if (in_float64) {
      multiply<double>(ta, tb, m, n, k, a, a_type, lda, b, b_type, ldb, *static_cast<const double*>(beta), c, c_type,
                       ldc, tf32);
    } else {
      multiply<float>(ta, tb, m, n, k, a, a_type, lda, b, b_type, ldb, *static_cast<const float*>(beta), c, c_type, ldc,
                      tf32);
    }
    return 0;
  } catch (const std::exception& error) {
    ptx::set_fault(error.what());
    return 14;  // CUBLAS_STATUS_INTERNAL_ERROR
  }
}

}  // extern "C"
