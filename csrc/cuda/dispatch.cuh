// From a run-time type to a template argument.
#pragma once

#include "device.cuh"
#include "launch.h"

namespace fastdpo::cuda {

template <typename T>
struct Tag {
  using type = T;
};

// Calls `use` with a Tag of the inputs' type.
template <typename Use>
void with_type(Type type, Use use) {
  switch (type) {
    case Type::kFloat32:
      return use(Tag<float>{});
    case Type::kFloat64:
      return use(Tag<double>{});
    case Type::kFloat16:
      return use(Tag<half>{});
    case Type::kBFloat16:
      return use(Tag<bfloat16>{});
  }
}

template <typename T>
struct OperandOf {
  using type = T;
};
template <>
struct OperandOf<half> {
  using type = float;
};

template <typename C>
LogitTransform<C> transform_in(const Transform& transform) {
  return {static_cast<C>(transform.scale), static_cast<C>(transform.softcap),
          static_cast<C>(transform.inv_temperature)};
}

}  // namespace fastdpo::cuda
