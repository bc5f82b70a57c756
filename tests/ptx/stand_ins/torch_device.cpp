// CPU tensors as tensors of a device: the host code gets addresses that nothing lies at on the host, so that it cannot
// read device memory by mistake, and every storage has its own. The functions named __wrap_ take the calls of csrc/cuda
// to torch (the linker's --wrap); __real_ are torch's own.
#include <ATen/core/Tensor.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstring>
#include <map>

#include "api.h"
#include "device.h"

namespace {

struct Entry {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  uint64_t base;
};
std::map<c10::StorageImpl*, Entry>& storages() {
  static auto* all = new std::map<c10::StorageImpl*, Entry>;  // never destroyed: tensors may outlive it
  return *all;
}

const at::Tensor& tensor_of(AtenTensorHandle handle) { return *reinterpret_cast<at::Tensor*>(handle); }

uint64_t base_of(const at::Tensor& tensor, bool known) {
  c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
  const auto found = storages().find(storage);
  if (found != storages().end()) return found->second.base;
  const std::string name =
      std::string(known ? "an input" : "a tensor of the op") + " of " + std::to_string(storage->nbytes()) + " bytes";
  auto* data = static_cast<std::byte*>(storage->mutable_data());
  const uint64_t base = ptx::the_machine().memory.add(name, storage->nbytes(), data, known).base;
  const auto strong = c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage);
  storages().emplace(storage, Entry{c10::weak_intrusive_ptr<c10::StorageImpl>(strong), base});
  return base;
}

}  // namespace

namespace ptx {

void forget_freed_tensors() {
  for (auto it = storages().begin(); it != storages().end();) {
    if (it->second.storage.expired()) {
      the_machine().memory.remove(it->second.base);
      it = storages().erase(it);
    } else {
      ++it;
    }
  }
}

}  // namespace ptx

extern "C" {

AOTITorchError __wrap_aoti_torch_get_data_ptr(AtenTensorHandle handle, void** data) {
  const at::Tensor& tensor = tensor_of(handle);
  ptx::forget_freed_tensors();
  if (tensor.storage().nbytes() == 0) {
    *data = nullptr;
  } else {
    const uint64_t offset = static_cast<uint64_t>(tensor.storage_offset()) * tensor.element_size();
    *data = reinterpret_cast<void*>(base_of(tensor, true) + offset);
  }
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError __wrap_aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  *index = 0;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError __real_torch_call_dispatcher(const char* op, const char* overload, StableIValue* stack, uint64_t abi);
AOTITorchError __wrap_torch_call_dispatcher(const char* op, const char* overload, StableIValue* stack, uint64_t abi) {
  const AOTITorchError error = __real_torch_call_dispatcher(op, overload, stack, abi);
  if (error == AOTI_TORCH_SUCCESS && std::strcmp(op, "aten::new_empty") == 0) {
    ptx::forget_freed_tensors();
    AtenTensorHandle handle;
    std::memcpy(&handle, &stack[0], sizeof(handle));
    if (tensor_of(handle).storage().nbytes() != 0) base_of(tensor_of(handle), false);
  }
  if (error == AOTI_TORCH_SUCCESS && std::strcmp(op, "aten::zero_") == 0) {  // torch's own kernel, in stream order
    AtenTensorHandle handle;
    std::memcpy(&handle, &stack[0], sizeof(handle));
    const at::Tensor& tensor = tensor_of(handle);
    const uint64_t offset = static_cast<uint64_t>(tensor.storage_offset()) * tensor.element_size();
    if (tensor.nbytes() != 0) ptx::the_machine().memory.mark_known(base_of(tensor, true) + offset, tensor.nbytes());
  }
  return error;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = ptx::the_stream();
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"
