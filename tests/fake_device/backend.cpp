// A second device for tests: two devices of real memory on the host, whose every operator runs on the CPU.
//
// One boxed fallback serves all operators. It hands them CPU tensors over the same memory and wraps their results, without a
// copy, so that values are the CPU's own. What a device must not mix is checked in Python (strict.py), above this file.
#include <ATen/ATen.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>
#include <torch/version.h>

#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#define AT_LEAST(minor) (TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= (minor))

namespace {

constexpr auto kFake = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 2;  // two, so that "the first device" and "the given device" differ
thread_local c10::DeviceIndex current = 0;

c10::Device on(c10::DeviceIndex index) { return c10::Device(kFake, index < 0 ? current : index); }

// -- what the runtime asks of a device: no streams, no events ---------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kFake; }
  c10::Device getDevice() const override { return on(current); }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Stream getStream(c10::Device device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, on(device.index())); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

struct Memory final : c10::Allocator {
#if AT_LEAST(3)
  c10::DataPtr allocate(size_t bytes) override {
#else
  c10::DataPtr allocate(size_t bytes) const override {
#endif
    auto host = c10::GetCPUAllocator()->allocate(bytes);
    void* data = host.get();
    return {data, new c10::DataPtr(std::move(host)), &release, on(current)};
  }
#if AT_LEAST(3)
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
#endif
  static void release(void* host) { delete static_cast<c10::DataPtr*>(host); }
};
Memory memory;

// Without `override`: which of these are virtual depends on the version.
struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const { return true; }
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  c10::DeviceIndex deviceCount() const { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const { return current; }
  void setCurrentDevice(c10::DeviceIndex index) const { current = index; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const { return std::exchange(current, index); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const { return std::exchange(current, index); }
};

// -- tensors of one kind over the memory of the other ------------------------------------------------------------------

at::Tensor over(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

at::Tensor on_host(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != kFake) return tensor;
  const auto& storage = tensor.storage();
  c10::DataPtr data(storage.mutable_data(), c10::Device(c10::kCPU));
  // resizable: an operator that enlarges its output moves to memory of its own, which `Call::give_back` notices
  c10::Storage alias(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(), true);
  return over(std::move(alias), c10::DispatchKey::CPU, tensor);
}

c10::Storage keep(const at::Tensor& host, c10::Device device) {
  const auto& storage = host.storage();
  c10::DataPtr data(storage.mutable_data(), new c10::Storage(storage), [](void* kept) { delete static_cast<c10::Storage*>(kept); }, device);
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), &memory, true);
}

class Call {
 public:
  c10::IValue to_host(const c10::IValue& value) {
    if (value.isTensor()) return host(value.toTensor());
    if (value.isDevice() && value.toDevice().type() == kFake) {
      device_ = on(value.toDevice().index());
      return c10::Device(c10::kCPU);
    }
    if (value.isTensorList()) {
      c10::List<at::Tensor> hosts;
      for (const at::Tensor& tensor : value.toTensorVector()) hosts.push_back(host(tensor));
      return hosts;
    }
    if (value.isOptionalTensorList()) {
      auto tensors = value.toOptionalTensorVector();
      c10::List<typename decltype(tensors)::value_type> hosts;  // of c10::optional before torch 2.3
      for (auto& tensor : tensors) {
        if (tensor) tensor = host(*tensor);
        hosts.push_back(tensor);
      }
      return hosts;
    }
    return value;
  }

  // Outputs that an operator has resized take the memory they are in now.
  void give_back() {
    for (auto& [device, host, storage] : seen_) {
      bool moved = host.storage().data() != device.storage().data();
      if (!moved && host.sizes() == device.sizes() && host.strides() == device.strides()) continue;
      auto* impl = device.unsafeGetTensorImpl();
      if (moved) impl->set_storage_keep_dtype(keep(host, device.device()));
      impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }

  c10::IValue to_device(const c10::IValue& value) {
    if (value.isTensor()) return fake(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> made;
      for (const at::Tensor& tensor : value.toTensorVector()) made.push_back(fake(tensor));
      return made;
    }
    return value;
  }

 private:
  struct Seen {
    at::Tensor device, host;
    c10::StorageImpl* storage;
  };

  at::Tensor host(const at::Tensor& tensor) {
    auto made = on_host(tensor);
    if (tensor.defined() && tensor.device().type() == kFake) {
      if (!device_) device_ = tensor.device();
      seen_.push_back({tensor, made, made.storage().unsafeGetStorageImpl()});
    }
    return made;
  }

  at::Tensor fake(const at::Tensor& tensor) {
    if (!tensor.defined() || !device_ || !tensor.device().is_cpu()) return tensor;
    for (auto& [device, host, storage] : seen_) {
      if (host.is_same(tensor)) return device;  // in place, or `out=`
      if (tensor.storage().unsafeGetStorageImpl() == storage) return over(device.storage(), c10::DispatchKey::PrivateUse1, tensor);
    }
    return over(keep(tensor, *device_), c10::DispatchKey::PrivateUse1, tensor);
  }

  std::optional<c10::Device> device_;
  std::vector<Seen> seen_;
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call call;
  const auto arguments = op.schema().arguments().size();
  for (size_t i = stack->size() - arguments; i < stack->size(); i++) (*stack)[i] = call.to_host((*stack)[i]);
  op.callBoxed(stack);
  call.give_back();
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); i++) (*stack)[i] = call.to_device((*stack)[i]);
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_host(to).copy_(on_host(from));
  return to;
}

at::Tensor& set_view(at::Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

at::Tensor& set_whole(at::Tensor& self, at::Storage storage) {
  const auto n = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return set_view(self, std::move(storage), 0, {n}, {1});
}

bool registered = [] {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

}  // namespace

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
REGISTER_ALLOCATOR(kFake, &memory);

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", copy_from);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Storage_storage_offset", set_view);
  // Operators that would be composed of others. The CPU has kernels of its own for most, which round differently; quantiles
  // are composed of float64 arithmetic, from which PyTorch spares MPS but not devices that it does not know.
  for (const char* name : {"convolution", "convolution_backward", "native_group_norm", "native_layer_norm", "silu_backward",
                           "quantile", "quantile.scalar"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
