#include "dispatch.cuh"
#include "gradients.cuh"

namespace fastdpo::cuda {

void scale_rows(const ScaleRowsArguments& a, void* stream) {
  with_type(a.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using O = typename OperandOf<T>::type;
    using C = typename ComputeOf<T>::type;
    const ScaleRows<T, O> work{static_cast<const C*>(a.grad_logps),
                               static_cast<const T*>(a.hidden),
                               a.targets,
                               a.rows,
                               static_cast<const C*>(a.row_state),
                               a.positions,
                               a.hidden_units,
                               a.ignore_index,
                               static_cast<C>(a.slope),
                               static_cast<O*>(a.scaled),
                               static_cast<O*>(a.coefficients)};
    launch_kernel("scale_rows", scale_rows_kernel<T, O>, a.count, kBlockThreads, stream, work);
  });
}

void scale_direction(Type type, const void* grad_logps, const void* direction, const int64_t* targets,
                     int64_t ignore_index, int64_t positions, int64_t hidden_units, void* grad_hidden, void* stream) {
  with_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = typename ComputeOf<T>::type;
    launch_kernel("scale_direction", scale_direction_kernel<T>, positions, kBlockThreads, stream,
                  static_cast<const C*>(grad_logps), static_cast<const C*>(direction), targets, ignore_index,
                  hidden_units, static_cast<T*>(grad_hidden));
  });
}

void convert(const void* from, Type from_type, void* to, Type to_type, int64_t count, void* stream) {
  with_type(from_type, [&](auto from_tag) {
    with_type(to_type, [&](auto to_tag) {
      using From = typename decltype(from_tag)::type;
      using To = typename decltype(to_tag)::type;
      launch_kernel("convert", convert_kernel<From, To>, elementwise_blocks(count), kBlockThreads, stream,
                    static_cast<const From*>(from), static_cast<To*>(to), count);
    });
  });
}

}  // namespace fastdpo::cuda
