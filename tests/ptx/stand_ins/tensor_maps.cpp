// cuTensorMapEncodeTiled, and how a program comes by it. It refuses what the driver refuses.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>

#include "tensor_map.h"

namespace {

CUresult encode(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* dims,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill) {
  ptx::TensorMap map{};
  map.magic = ptx::TensorMap::kMagic;
  map.address = reinterpret_cast<uint64_t>(address);
  map.rank = rank;
  map.swizzle = swizzle;
  map.element_bytes = 2;
  const bool known = (type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ||
                      type == CU_TENSOR_MAP_DATA_TYPE_UINT16) &&
                     rank >= 3 && rank <= 5 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                     swizzle <= CU_TENSOR_MAP_SWIZZLE_128B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  if (!known || map.address % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (dims[i] == 0 || dims[i] > (uint64_t{1} << 32) || box[i] == 0 || box[i] > 256 || element_strides[i] != 1) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    map.dims[i] = static_cast<uint32_t>(dims[i]);
    map.box[i] = static_cast<uint16_t>(box[i]);
  }
  for (cuuint32_t i = 0; i + 1 < rank; ++i) {
    if (strides[i] % 16 != 0 || strides[i] >= (uint64_t{1} << 40)) return CUDA_ERROR_INVALID_VALUE;
    map.strides[i] = strides[i];
  }
  const uint32_t row_bytes = box[0] * map.element_bytes;
  const uint32_t most[] = {256 * 2, 32, 64, 128};
  if (row_bytes % 16 != 0 || row_bytes > most[swizzle]) return CUDA_ERROR_INVALID_VALUE;
  std::memset(out, 0, sizeof(*out));
  std::memcpy(out, &map, sizeof(map));
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                                        unsigned long long, cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(encode) : nullptr;
  if (result != nullptr) *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
