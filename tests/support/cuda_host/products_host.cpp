// csrc/cuda/products.h for the host: the sums are float32 (float64), as on a device.
#include <cmath>
#include <cstring>

#include "cuda_shim.h"
#include "products.h"

namespace fastdpo::cuda {
namespace {

double load(const void* data, Type type, int64_t index) {
  switch (type) {
    case Type::kFloat32:
      return static_cast<const float*>(data)[index];
    case Type::kFloat64:
      return static_cast<const double*>(data)[index];
    case Type::kFloat16:
      return __half2float(static_cast<const __half*>(data)[index]);
    case Type::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
  }
  std::abort();
}

void store(void* data, Type type, int64_t index, double value) {
  switch (type) {
    case Type::kFloat32:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      return;
    case Type::kFloat64:
      static_cast<double*>(data)[index] = value;
      return;
    case Type::kFloat16:
      static_cast<__half*>(data)[index] = __float2half_rn(static_cast<float>(value));
      return;
    case Type::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[index] = __float2bfloat16_rn(static_cast<float>(value));
      return;
  }
}

// The most that a device may make of TF32.
float cut_to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits &= ~0x1fffu;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename Sum>
std::vector<Sum> unpacked(const Matrix& matrix, Type type, int64_t rows, int64_t columns, bool tensor_float32) {
  std::vector<Sum> out(rows * columns);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t index = matrix.transposed ? c * matrix.stride + r : r * matrix.stride + c;
      const double value = load(matrix.data, type, index);
      out[r * columns + c] = static_cast<Sum>(tensor_float32 ? cut_to_tf32(static_cast<float>(value)) : value);
    }
  }
  return out;
}

template <typename Sum>
void multiply_in(const Product& p) {
  const std::vector<Sum> a = unpacked<Sum>(p.a, p.operands, p.rows, p.depth, p.tensor_float32);
  const std::vector<Sum> b = unpacked<Sum>(p.b, p.operands, p.depth, p.columns, p.tensor_float32);
  std::vector<Sum> row(p.columns);
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t c = 0; c < p.columns; ++c) {
      row[c] = p.accumulate ? static_cast<Sum>(load(p.out, p.out_type, r * p.out_stride + c)) : Sum(0);
    }
    for (int64_t d = 0; d < p.depth; ++d) {
      for (int64_t c = 0; c < p.columns; ++c) row[c] += a[r * p.depth + d] * b[d * p.columns + c];
    }
    for (int64_t c = 0; c < p.columns; ++c) store(p.out, p.out_type, r * p.out_stride + c, row[c]);
  }
}

}  // namespace

void multiply(const Product& product) {
  if (product.operands == Type::kFloat64) {
    multiply_in<double>(product);
  } else {
    multiply_in<float>(product);
  }
}

}  // namespace fastdpo::cuda
