// The fused kernels' matrix products: oneDNN's micro-kernel, through ATen.
#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include <cmath>
#include <vector>

#include "fused.h"

namespace fastdpo::cpu {
namespace {

// Whether the micro-kernel multiplies interleaved bfloat16 here, and rightly: ATen has no way to ask.
bool bf16_products_work() {
  constexpr int64_t kSize = 16, kInner = 32;
  std::vector<at::BFloat16> a(kSize * kInner), b(kInner * kSize);
  std::vector<float> result(kSize * kSize);
  for (int64_t i = 0; i < kSize * kInner; ++i) a[i] = static_cast<float>(i % 7 - 3);
  for (int64_t i = 0; i < kSize * kInner; ++i) b[i] = static_cast<float>(i % 5 - 2);
  try {
    const MatrixUnits units;
    at::native::cpublas::brgemm(kSize, kSize, kInner, kInner, kSize, kSize, false, a.data(), b.data(), result.data(),
                                true);
  } catch (const c10::Error&) {
    return false;
  }
  for (int64_t i = 0; i < kSize; ++i) {
    for (int64_t j = 0; j < kSize; ++j) {
      float expected = 0;
      for (int64_t k = 0; k < kInner; ++k) {
        expected += static_cast<float>(a[i * kInner + k]) * static_cast<float>(b[(k / 2 * kSize + j) * 2 + k % 2]);
      }
      if (result[i * kSize + j] != expected) return false;
    }
  }
  return true;
}

}  // namespace

std::optional<at::ScalarType> fused_operand(const at::Tensor& hidden) {
  if (tile_kernels() == nullptr || hidden.scalar_type() == at::kDouble) return std::nullopt;
  // Interleaved rows come in pairs.
  if (hidden.scalar_type() != at::kBFloat16 || hidden.size(1) % 2 != 0 || tile_kernels()->bf16 == nullptr) {
    return at::kFloat;
  }
  static const bool kBf16Products = at::globalContext().userEnabledMkldnn() && bf16_products_work();
  return kBf16Products ? at::kBFloat16 : at::kFloat;
}

void check_products(at::ScalarType operand) {
  TORCH_CHECK(operand != at::kBFloat16 || at::globalContext().userEnabledMkldnn(),
              "torch.backends.mkldnn was disabled after fastdpo had begun to use it; enable it, or set "
              "FASTDPO_CPU_PATH=avx512 before the first call");
}

void multiply(const Product& p, const float* a, const float* b, float* result) {
  at::native::cpublas::brgemm(p.m, p.n, p.k, p.a_stride, p.b_stride, p.result_stride, p.add, a, b, result, false);
}

void multiply(const Product& p, const Bf16Bits* a, const Bf16Bits* b, float* result) {
  at::native::cpublas::brgemm(p.m, p.n, p.k, p.a_stride, p.b_stride, p.result_stride, p.add,
                              reinterpret_cast<const at::BFloat16*>(a), reinterpret_cast<const at::BFloat16*>(b),
                              result, true);
}

void multiply_rows(int64_t m, int64_t k, int64_t hidden_size, const float* a, int64_t a_stride, const float* b,
                   float* result, bool add) {
  multiply({m, hidden_size, k, a_stride, hidden_size, round_up(hidden_size, kPanel), add}, a, b, result);
}

void multiply_rows(int64_t m, int64_t k, int64_t hidden_size, const Bf16Bits* a, int64_t a_stride, const Bf16Bits* b,
                   float* result, bool add) {
  const int64_t padded = round_up(k, OperandLayout<Bf16Bits>::kRowsPad);
  const int64_t stride = round_up(hidden_size, kPanel);
  for (int64_t panel = 0; panel < stride; panel += kPanel) {
    multiply({m, kPanel, padded, a_stride, kPanel, stride, add}, a, b + panel * padded, result + panel);
  }
}

MatrixUnits::~MatrixUnits() {
  // ATen packs where there are matrix units.
  static const bool kHasUnits = at::native::cpublas::could_pack(at::kBFloat16);
  if (kHasUnits) at::native::cpublas::brgemm_release(true);
}

}  // namespace fastdpo::cpu
