// A device whose memory is host memory and whose kernels are the CPU's, but whose tensors meet no others.
//
// A machine without a GPU shows with it what a GPU would refuse: an operation on tensors of two devices. It counts what
// a GPU waits for: copies from and to the host, and scalars that are read. torch calls such a device PrivateUse1.

#include <torch/extension.h>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <map>
#include <set>
#include <string>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr auto OURS = c10::DeviceType::PrivateUse1;
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

// --- what is counted ---------------------------------------------------------------------------------------

struct Counts {
  long to_device = 0, to_host = 0, scalars = 0, kernels = 0;
  std::map<std::string, long> operations;
};
Counts counts;

// --- memory ------------------------------------------------------------------------------------------------

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto data = c10::GetCPUAllocator()->allocate(bytes);
    auto* kept = new c10::DataPtr(std::move(data));
    return {kept->get(), kept, [](void* p) { delete static_cast<c10::DataPtr*>(p); }, c10::Device(OURS, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(OURS, &memory);

// The same memory as a tensor of the other device.
Tensor seen_as(const Tensor& tensor, c10::DeviceType type, c10::Allocator* allocator, c10::DispatchKeySet keys) {
  auto* kept = new c10::Storage(tensor.storage());
  c10::DataPtr data(
      tensor.storage().mutable_data(), kept, [](void* p) { delete static_cast<c10::Storage*>(p); },
      c10::Device(type, type == OURS ? 0 : -1));
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), tensor.storage().nbytes(), std::move(data), allocator, type != OURS);
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, tensor.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  return made;
}

Tensor on_host(const Tensor& tensor) {
  if (!tensor.defined() || tensor.device().is_cpu()) return tensor;
  return seen_as(tensor, c10::DeviceType::CPU, c10::GetCPUAllocator(), c10::DispatchKeySet(c10::DispatchKey::CPU));
}

Tensor on_device(const Tensor& tensor) { return seen_as(tensor, OURS, &memory, KEYS); }

Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(dtype));
}

const Tensor& resize(const Tensor& tensor, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = tensor.unsafeGetTensorImpl();
  const size_t bytes = (c10::multiply_integers(size) + tensor.storage_offset()) * tensor.element_size();
  if (bytes > tensor.storage().nbytes()) {
    auto data = memory.allocate(bytes);
    std::memcpy(data.get(), tensor.storage().data(), tensor.storage().nbytes());
    tensor.storage().set_data_ptr(std::move(data));
    tensor.storage().set_nbytes(bytes);
  }
  impl->set_sizes_contiguous(size);
  return tensor;
}

// --- copies and scalars ------------------------------------------------------------------------------------

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (from.device().is_cpu() != to.device().is_cpu()) {
    ++(from.device().is_cpu() ? counts.to_device : counts.to_host);
  } else {
    ++counts.kernels;
  }
  at::NoGradGuard no_grad;
  on_host(to).copy_(on_host(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar scalar(const Tensor& tensor) {
  ++counts.scalars;
  return on_host(tensor).item();
}

// --- everything else: the CPU's kernel on the same memory --------------------------------------------------

// CUDA takes indices from the host.
const std::set<std::string> MIXED = {
    "aten::index.Tensor", "aten::_index_put_impl_", "aten::index_put_", "aten::_unsafe_index.Tensor"};

template <typename Visit>
void each_tensor(const c10::IValue& value, Visit visit) {
  if (value.isTensor()) {
    visit(value.toTensor());
  } else if (value.isTensorList()) {
    for (const Tensor& tensor : value.toTensorList()) visit(tensor);
  } else if (value.isOptionalTensorList()) {
    for (OptionalTensor tensor : value.toOptionalTensorList()) {
      if (tensor) visit(*tensor);
    }
  }
}

template <typename Change>
c10::IValue with_tensors(const c10::IValue& value, Change change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorList()) list.push_back(change(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<OptionalTensor> list;
    for (OptionalTensor tensor : value.toOptionalTensorList()) {
      list.push_back(tensor ? OptionalTensor(change(*tensor)) : tensor);
    }
    return list;
  }
  return value;
}

void refuse_two_devices(const std::string& name, c10::ArrayRef<c10::IValue> arguments) {
  std::string strangers;
  bool ours = false;
  for (const auto& argument : arguments) {
    each_tensor(argument, [&](const Tensor& tensor) {
      if (!tensor.defined()) return;
      ours |= tensor.device().type() == OURS;
      // A scalar of the host may go along, as on a GPU.
      if (tensor.device().is_cpu() && tensor.dim() > 0) strangers += " " + c10::str(tensor.sizes());
    });
  }
  TORCH_CHECK(strangers.empty() || !ours || MIXED.count(name), "two devices meet in ", name, "; on the host:", strangers);
}

void by_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = c10::toString(op.operator_name());
  const size_t begin = stack->size() - schema.arguments().size();
  refuse_two_devices(name, torch::jit::last(*stack, schema.arguments().size()));
  ++counts.kernels;
  ++counts.operations[name];

  std::vector<std::pair<Tensor, Tensor>> given;  // as the host sees it, and ours
  for (size_t i = begin; i < stack->size(); ++i) {
    auto& argument = (*stack)[i];
    argument = with_tensors(argument, [&](const Tensor& tensor) {
      if (!tensor.defined() || tensor.device().is_cpu()) return tensor;
      given.emplace_back(on_host(tensor), tensor);
      return given.back().first;
    });
    if (argument.isDevice()) argument = c10::Device(c10::DeviceType::CPU);
  }
  op.callBoxed(stack);

  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    (*stack)[i] = with_tensors((*stack)[i], [&](const Tensor& result) -> Tensor {
      if (!result.defined()) return result;
      for (auto& [host, ours] : given) {
        if (!host.is_same(result)) continue;
        if (ours.sizes() != result.sizes() || ours.strides() != result.strides()) {  // an `out` that was resized
          const auto kept = result.clone();
          ours.resize_(kept.sizes());
          on_host(ours).copy_(kept);
        }
        return ours;
      }
      return on_device(result);
    });
  }
}

Tensor convolution(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding,
    int64_t groups) {
  const bool has_bias = bias && bias->defined();
  TORCH_CHECK(
      x.device() == weight.device() && (!has_bias || bias->device() == x.device()),
      "two devices meet in convolution: the input on ", x.device(), ", the weight on ", weight.device());
  TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "an input of ", x.scalar_type(), " and a weight of ", weight.scalar_type());
  ++counts.kernels;
  ++counts.operations["aten::convolution"];
  auto y = at::convolution(
      on_host(x), on_host(weight), has_bias ? OptionalTensor(on_host(*bias)) : OptionalTensor(), stride, padding,
      dilation, transposed, output_padding, groups);
  return on_device(y.contiguous(x.suggest_memory_format()));
}

int64_t plain_attention(
    const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double, bool, std::optional<double>, bool) {
  return static_cast<int64_t>(sdp::SDPBackend::math);
}

// --- registration ------------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = OURS;
  c10::DeviceType type() const override { return OURS; }
  c10::Device exchangeDevice(c10::Device) const override { return {OURS, 0}; }
  c10::Device getDevice() const override { return {OURS, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<at::CPUGeneratorImpl>();
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return false; }
};

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &plain_attention)
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", at::native::view);
  library.impl("_reshape_alias", at::native::_reshape_alias);
  library.impl("unfold", at::native::unfold);
  library.impl("resize_", resize);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", scalar);
  library.impl("convolution_overrideable", convolution);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("init", [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); });
  module.def("reset", [] { counts = Counts(); });
  module.def("counts", [] {
    py::dict result, operations;
    for (const auto& [name, count] : counts.operations) operations[py::str(name)] = count;
    result["to_device"] = counts.to_device;
    result["to_host"] = counts.to_host;
    result["scalars"] = counts.scalars;
    result["kernels"] = counts.kernels;
    result["operations"] = operations;
    return result;
  });
}
