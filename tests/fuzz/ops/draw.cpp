#include "draw.h"

#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace fastdpo::fuzz {
namespace {

constexpr std::array kDtypes{at::kFloat, at::kBFloat16, at::kHalf, at::kDouble};
// Around the kernels' lanes, panels, tiles and blocks.
constexpr std::array<int64_t, 24> kEdges{1,   2,   3,   15,  16,  17,  31,  32,  33,  63,  64,   65,
                                         127, 128, 129, 191, 192, 255, 256, 257, 300, 513, 1025, 1300};
// Of one call: extended precision is slow.
constexpr int64_t kMostProducts = 80'000;

int64_t draw_size(FuzzedDataProvider& bytes, int64_t least, int64_t most) {
  const int64_t size =
      bytes.ConsumeBool() ? bytes.PickValueInArray(kEdges) : bytes.ConsumeIntegralInRange<int64_t>(0, 40);
  return std::clamp(size, least, std::max(most, least));
}

enum class Values { kNormal, kIntegers, kEqual, kRepeatedRows, kCancelling, kWild, kBytes, kMaxValue = kBytes };

double from_bytes(FuzzedDataProvider& bytes) {
  constexpr std::array<double, 10> kSpecial{std::numeric_limits<double>::infinity(),
                                            -std::numeric_limits<double>::infinity(),
                                            std::numeric_limits<double>::quiet_NaN(),
                                            -0.0,
                                            1e-45,
                                            1e-39,
                                            65504,
                                            3e38,
                                            1e-310,
                                            -1e4};
  if (bytes.ConsumeBool()) return bytes.PickValueInArray(kSpecial);
  const auto word = bytes.ConsumeIntegral<uint32_t>();
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

std::vector<double> draw_values(FuzzedDataProvider& bytes, int64_t rows, int64_t columns) {
  const auto kind = bytes.ConsumeEnum<Values>();
  constexpr std::array<double, 8> kSpreads{1, 0.1, 0.5, 3, 10, 40, 1e4, 1e-4};
  const double spread = bytes.PickValueInArray(kSpreads);
  std::mt19937_64 random(bytes.ConsumeIntegral<uint16_t>());
  std::normal_distribution<double> normal;
  std::vector<double> values(rows * columns);
  const double constant = normal(random) * spread;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < columns; ++k) {
      double& value = values[i * columns + k];
      switch (kind) {
        case Values::kNormal:
        case Values::kBytes:
          value = normal(random) * spread;
          break;
        case Values::kIntegers:
          value = static_cast<double>(random() % 7) - 3;
          break;
        case Values::kEqual:
          value = constant;
          break;
        case Values::kRepeatedRows:
          value = i < 3 ? normal(random) * spread : values[(i % 3) * columns + k];
          break;
        case Values::kCancelling:
          value = i % 2 == 0 ? normal(random) * spread : -values[(i - 1) * columns + k];
          break;
        case Values::kWild:
          value = normal(random) * std::pow(10.0, static_cast<double>(random() % 77) - 38);
          break;
      }
    }
  }
  const size_t special = kind == Values::kBytes ? 8 : bytes.ConsumeIntegralInRange<size_t>(0, 15) == 0 ? 1 : 0;
  for (size_t i = 0; i < special && !values.empty(); ++i) {
    values[bytes.ConsumeIntegral<uint16_t>() % values.size()] = from_bytes(bytes);
  }
  return values;
}

// The same values in a part of a larger storage: rows begin at any element.
at::Tensor inside(FuzzedDataProvider& bytes, const at::Tensor& tensor) {
  const int64_t offset = bytes.ConsumeIntegralInRange<int64_t>(0, 9);
  at::Tensor storage = at::empty({offset + tensor.numel()}, tensor.options());
  at::Tensor part = storage.narrow(0, offset, tensor.numel()).view(tensor.sizes());
  part.copy_(tensor);
  return part;
}

at::Tensor to_tensor(FuzzedDataProvider& bytes, const std::vector<double>& values, at::IntArrayRef shape,
                     at::ScalarType dtype) {
  const at::Tensor exact = at::tensor(values, at::kDouble).view(shape);
  return inside(bytes, exact.to(dtype));
}

double draw_factor(FuzzedDataProvider& bytes, double usual) {
  constexpr std::array<double, 12> kFactors{1, 0.25, -0.5, 2, 0.7, 30, 0.0625, 5, 1e-3, 50, 1e3, 1e-30};
  constexpr std::array<double, 8> kBad{
      0,      -1,   std::numeric_limits<double>::quiet_NaN(), 1e-320, std::numeric_limits<double>::infinity(), 1e300,
      -1e300, 1e-46};
  switch (bytes.ConsumeIntegralInRange(0, 15)) {
    case 0:
      return bytes.PickValueInArray(kBad);
    case 1:
    case 2:
    case 3:
    case 4:
      return bytes.PickValueInArray(kFactors);
    default:
      return usual;
  }
}

at::Tensor relaid(FuzzedDataProvider& bytes, const at::Tensor& tensor) {
  switch (bytes.ConsumeIntegralInRange(0, 9)) {
    case 0:
      return tensor.dim() == 2 ? tensor.t().contiguous().t() : tensor;
    case 1:
      return at::stack({tensor, tensor}, -1).select(-1, 1);
    case 2:
      return tensor.numel() > 0 ? tensor.flatten()[0].expand(tensor.sizes()) : tensor;
    case 3:
      return tensor.unsqueeze(0);
    case 4:
      return tensor.flatten();
    case 5:
      return tensor.dim() > 0 ? tensor.narrow(0, 0, tensor.size(0) / 2) : tensor;
    case 6:
      return tensor.dim() > 0 ? at::cat({tensor, tensor}, -1) : tensor;
    case 7: {
      constexpr std::array kOthers{at::kInt,    at::kLong,     at::kBool, at::kByte,        at::kFloat,
                                   at::kDouble, at::kBFloat16, at::kHalf, at::kComplexFloat};
      return tensor.to(bytes.PickValueInArray(kOthers));
    }
    case 8:
      return at::empty({bytes.ConsumeIntegralInRange<int64_t>(0, 3), 0}, tensor.options());
    default: {
      // Many rows of nothing take no memory.
      const int64_t rows = int64_t{1} << bytes.ConsumeIntegralInRange(30, 62);
      return at::empty({rows, 0}, tensor.options());
    }
  }
}

}  // namespace

Drawn draw(FuzzedDataProvider& bytes) {
  Drawn d;
  const auto dtype = bytes.PickValueInArray(kDtypes);
  const int64_t h = draw_size(bytes, 1, 300);
  const int64_t v = draw_size(bytes, 1, kMostProducts / h);
  const int64_t n = draw_size(bytes, 0, kMostProducts / (h * v));
  d.misused = false;
  d.threads = bytes.ConsumeIntegralInRange(1, 3);
  d.hidden = to_tensor(bytes, draw_values(bytes, n, h), {n, h}, dtype);
  d.weight = to_tensor(bytes, draw_values(bytes, v, h), {v, h}, dtype);
  constexpr std::array<int64_t, 5> kIgnored{-100, -1, 0, std::numeric_limits<int64_t>::min(),
                                            std::numeric_limits<int64_t>::max()};
  d.ignore_index = bytes.PickValueInArray(kIgnored);
  std::mt19937_64 random(bytes.ConsumeIntegral<uint16_t>());
  const int ignored = bytes.ConsumeIntegralInRange(0, 4);
  std::vector<int64_t> targets(n);
  const int64_t one = bytes.ConsumeIntegralInRange<int64_t>(0, v - 1);
  const bool one_target = bytes.ConsumeIntegralInRange(0, 3) == 0;
  for (auto& y : targets) {
    y = static_cast<int>(random() % 4) < ignored ? d.ignore_index
        : one_target                             ? one
                                                 : static_cast<int64_t>(random() % v);
  }
  if (n > 0 && bytes.ConsumeIntegralInRange(0, 15) == 0) {
    constexpr std::array<int64_t, 6> kForeign{
        -1, -100, -2, int64_t{1} << 40, std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()};
    const auto at = bytes.ConsumeIntegral<uint16_t>() % n;
    targets[at] = bytes.ConsumeBool() ? v : bytes.PickValueInArray(kForeign);
    d.misused = targets[at] != d.ignore_index && (targets[at] < 0 || targets[at] >= v);
  }
  d.targets = inside(bytes, at::tensor(targets, at::kLong));
  if (bytes.ConsumeBool()) {
    auto values = draw_values(bytes, v, 1);
    const int masked = bytes.ConsumeIntegralInRange(0, 7);
    for (int64_t j = 0; masked == 0 && j < v; ++j) {
      if (random() % 3 == 0) values[j] = -std::numeric_limits<double>::infinity();
    }
    d.bias = to_tensor(bytes, values, {v}, bytes.ConsumeBool() ? dtype : bytes.PickValueInArray(kDtypes));
  }
  d.scale = draw_factor(bytes, 1);
  d.softcap = bytes.ConsumeIntegralInRange(0, 3) == 0 ? draw_factor(bytes, 30) : 0;
  d.temperature = draw_factor(bytes, 1);
  d.num_scored = -1;
  if (bytes.ConsumeBool()) d.num_scored = d.targets.ne(d.ignore_index).sum().item<int64_t>();
  if (bytes.ConsumeIntegralInRange(0, 31) == 0) {
    d.num_scored = bytes.ConsumeIntegral<int64_t>();
    d.misused = true;
  }
  const int needs = bytes.ConsumeIntegralInRange(0, 15);
  d.need_hidden = needs % 8 != 0 && (needs & 1 || needs > 7);
  d.need_weight = (needs & 2) != 0 || needs > 7;
  d.need_bias = d.bias.has_value() && ((needs & 4) != 0 || needs > 7);
  const int64_t row_bytes = v * static_cast<int64_t>(dtype == at::kHalf ? 4 : at::elementSize(dtype));
  switch (bytes.ConsumeIntegralInRange(0, 4)) {
    case 0:
      d.retain_bytes = 0;
      break;
    case 1:
      d.retain_bytes = row_bytes * n;
      break;
    case 2:
      d.retain_bytes = bytes.ConsumeIntegral<int64_t>();
      break;
    default:
      d.retain_bytes = bytes.ConsumeIntegralInRange<int64_t>(0, row_bytes * std::max<int64_t>(n, 1));
  }
  d.entropy = bytes.ConsumeBool();
  d.log_sum_sq_probs = bytes.ConsumeBool();
  d.mean_logits = bytes.ConsumeBool();
  d.top_gap = bytes.ConsumeBool();
  const auto compute = dtype == at::kDouble ? at::kDouble : at::kFloat;
  std::vector<double> grads(n);
  std::normal_distribution<double> normal;
  for (auto& c : grads) c = random() % 8 == 0 ? 0 : normal(random);
  d.grad_logps = inside(bytes, at::tensor(grads, at::kDouble).to(compute));
  if (bytes.ConsumeIntegralInRange(0, 3) == 0 && d.need_weight)
    d.weight_sum = at::randn({v, h}, d.hidden.options().dtype(compute));
  if (bytes.ConsumeIntegralInRange(0, 3) == 0 && d.need_bias)
    d.bias_sum = at::randn({v}, d.hidden.options().dtype(compute));
  if (bytes.ConsumeIntegralInRange(0, 7) == 0) {
    d.misused = true;
    for (int i = bytes.ConsumeIntegralInRange(1, 2); i > 0; --i) {
      switch (bytes.ConsumeIntegralInRange(0, 6)) {
        case 0:
          d.hidden = relaid(bytes, d.hidden);
          break;
        case 1:
          d.weight = relaid(bytes, d.weight);
          break;
        case 2:
          d.targets = relaid(bytes, d.targets);
          break;
        case 3:
          if (d.bias.has_value()) d.bias = relaid(bytes, *d.bias);
          break;
        case 4:
          d.grad_logps = relaid(bytes, d.grad_logps);
          break;
        case 5:
          d.weight_sum = relaid(bytes, d.weight_sum.value_or(d.weight));
          break;
        default:
          // Rows of no numbers.
          d.hidden = at::empty({n, 0}, d.hidden.options());
          d.weight = relaid(bytes, d.weight);
      }
    }
  }
  return d;
}

void spoil_state(FuzzedDataProvider& bytes, at::Tensor& row_state, at::Tensor& direction, at::Tensor& retained,
                 at::Tensor& grad_logps) {
  at::Tensor* const all[] = {&row_state, &direction, &retained, &grad_logps};
  at::Tensor& one = *all[bytes.ConsumeIntegralInRange(0, 3)];
  one = relaid(bytes, one);
}

}  // namespace fastdpo::fuzz
