#include "exponentials.cuh"

namespace fastdpo::cuda {

void exponentials_bf16_sums_extras(const ExponentialsArguments& arguments, void* stream) {
  ExponentialsKernel<cutlass::bfloat16_t, false, true>::run(arguments, static_cast<cudaStream_t>(stream));
}

}  // namespace fastdpo::cuda
