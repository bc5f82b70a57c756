// Level 1's kernels in one translation unit: CUTLASS's headers are read once, which takes most of the time.
#include "../../../csrc/cuda/hopper/exponentials_bf16_operand.cu"
#include "../../../csrc/cuda/hopper/exponentials_bf16_operand_extras.cu"
#include "../../../csrc/cuda/hopper/exponentials_bf16_sums.cu"
#include "../../../csrc/cuda/hopper/exponentials_bf16_sums_extras.cu"
#include "../../../csrc/cuda/hopper/exponentials_fp16_sums.cu"
