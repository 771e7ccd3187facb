// Lets a PyTorch without CUDA trace operators on CUDA tensors that are not there; PyTorch with CUDA has its own.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
}
