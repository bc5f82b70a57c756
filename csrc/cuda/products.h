// Matrix products: out = a b, or out += a b. Free of torch.
#pragma once

#include <cstdint>

#include "launch.h"

namespace fastdpo::cuda {

// A row-major matrix in memory; `transposed` means that the product reads its transpose.
struct Matrix {
  const void* data;
  int64_t stride;
  bool transposed;
};

struct Product {
  int64_t rows;     // of a and out
  int64_t columns;  // of b and out
  int64_t depth;
  Type operands;
  Matrix a;
  Matrix b;
  void* out;  // [rows, columns] row-major
  int64_t out_stride;
  Type out_type;  // float32 for 16-bit operands, or the operands' type; sums are float32 (float64) in every case
  bool accumulate;
  // The operands are float16 numbers or were rounded to TF32, whose mantissa is float16's (round_to_tf32).
  bool tensor_float32;
};

// Queued on torch's current stream.
void multiply(const Product& product);

}  // namespace fastdpo::cuda
