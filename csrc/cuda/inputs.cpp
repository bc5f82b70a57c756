#include "inputs.h"

#include <torch/csrc/stable/ops.h>

#include <exception>
#include <stdexcept>

#include "runtime.h"

namespace fastdpo::cuda {
namespace {

constexpr int64_t kMostEntries = (int64_t{1} << 31) - 256;  // a chunk, rounded up, is counted in 32 bits

std::optional<Type> float_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Type::kFloat32;
    case ScalarType::Double:
      return Type::kFloat64;
    case ScalarType::Half:
      return Type::kFloat16;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    default:
      return std::nullopt;
  }
}

std::string text(ScalarType type) { return torch::headeronly::toString(type); }

std::string text(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

std::vector<int64_t> shape_of(const Tensor& tensor) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < tensor.dim(); ++i) shape.push_back(tensor.size(i));
  return shape;
}

}  // namespace

ScalarType scalar_type(Type type) {
  switch (type) {
    case Type::kFloat32:
      return ScalarType::Float;
    case Type::kFloat64:
      return ScalarType::Double;
    case Type::kFloat16:
      return ScalarType::Half;
    case Type::kBFloat16:
      break;
  }
  return ScalarType::BFloat16;
}

std::string shape_text(const Tensor& tensor) { return text(shape_of(tensor)); }

void check_tensor(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape, ScalarType type,
                  const Tensor& hidden) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, "`", name, "` is ", text(tensor.scalar_type()), ", but must be ",
                  text(type));
  STD_TORCH_CHECK(shape_of(tensor) == shape, "`", name, "` has shape ", shape_text(tensor), ", but must have ",
                  text(shape));
  STD_TORCH_CHECK(tensor.is_contiguous(), "`", name, "` must be contiguous");
  STD_TORCH_CHECK(tensor.is_cpu() == hidden.is_cpu() && tensor.get_device_index() == hidden.get_device_index(), "`",
                  name, "` is on another device than `hidden` (device index ", tensor.get_device_index(), ", not ",
                  hidden.get_device_index(), ")");
}

Tensor Inputs::empty(const std::vector<int64_t>& shape, ScalarType element) const {
  try {
    return torch::stable::new_empty(hidden, shape, element);
  } catch (const std::exception& error) {
    check_device(stream);
    // The stable ABI says only that a call failed. The front end looks for these words
    // (fastdpo/logps/out_of_memory.py).
    throw std::runtime_error("fastdpo: out of memory: could not allocate " + text(shape) + " of " + text(element) +
                             " (" + error.what() + ")");
  }
}

Inputs check_inputs(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                    const std::optional<Tensor>& bias, int64_t ignore_index, int64_t num_scored, double logit_scale,
                    double softcap, double temperature) {
  const ScalarType type = hidden.scalar_type();
  const std::optional<Type> input_type = float_type(type);
  const std::optional<Type> bias_type = bias.has_value() ? float_type(bias->scalar_type()) : input_type;
  STD_TORCH_CHECK(input_type.has_value(), "`hidden` is ", text(type),
                  ", but must be float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(bias_type.has_value(), "`bias` is ", text(bias->scalar_type()),
                  ", but must be float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(hidden.dim() == 2, "`hidden` has shape ", shape_text(hidden), ", but must have [N, H]");
  STD_TORCH_CHECK(weight.dim() == 2, "`weight` has shape ", shape_text(weight), ", but must have [V, H]");
  const int64_t positions = hidden.size(0);
  const int64_t hidden_units = hidden.size(1);
  const int64_t vocabulary = weight.size(0);
  STD_TORCH_CHECK(vocabulary >= 1 && vocabulary <= kMostEntries && hidden_units >= 1 && hidden_units <= kMostEntries,
                  "`weight` has shape ", shape_text(weight), ", but both sizes must lie in [1, ", kMostEntries, "]");
  check_tensor("hidden", hidden, {positions, hidden_units}, type, hidden);
  check_tensor("weight", weight, {vocabulary, hidden_units}, type, hidden);
  check_tensor("targets", targets, {positions}, ScalarType::Long, hidden);
  if (bias.has_value()) check_tensor("bias", *bias, {vocabulary}, bias->scalar_type(), hidden);
  STD_TORCH_CHECK(num_scored >= -1 && num_scored <= positions, "`num_scored` is ", num_scored,
                  ", but must be -1 (not known) or lie in [0, N = ", positions, "]");
  STD_TORCH_CHECK(softcap >= 0, "`softcap` is ", softcap, ", but must be positive, or 0 for none");
  STD_TORCH_CHECK(temperature > 0, "`temperature` is ", temperature, ", but must be positive");

  Inputs in{.hidden = hidden,
            .type = *input_type,
            .positions = positions,
            .hidden_units = hidden_units,
            .vocabulary = vocabulary,
            .ignore_index = ignore_index,
            .num_scored = num_scored,
            .transform = {logit_scale, softcap, 1 / temperature},
            .stream = current_stream(hidden.get_device_index()),
            .hidden_data = static_cast<const char*>(hidden.data_ptr()),
            .weight_data = static_cast<const char*>(weight.data_ptr()),
            .targets = static_cast<const int64_t*>(targets.data_ptr()),
            .bias_type = *bias_type,
            .bias_as_compute = Tensor()};
  if (bias.has_value()) {
    // In the compute type, so that the row kernel needs no instantiation for every type of bias.
    in.bias_as_compute = *bias;
    if (in.compute() != in.bias_type) {
      in.bias_as_compute = in.empty({vocabulary}, in.compute());
      convert(bias->data_ptr(), in.bias_type, in.bias_as_compute.data_ptr(), in.compute(), vocabulary, in.stream);
    }
    in.bias = static_cast<const char*>(in.bias_as_compute.data_ptr());
  }
  return in;
}

}  // namespace fastdpo::cuda
