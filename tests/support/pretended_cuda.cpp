#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
static int count = 1;
static thread_local StreamId current = 0;
static thread_local DeviceIndex place = 0;  // as CUDA has it: another thread begins on device 0
static Device device() { return Device(DeviceType::CUDA, place); }
static Stream stream() { return Stream(Stream::UNSAFE, device(), current); }
struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device d) const override { auto old = device(); setDevice(d); return old; }
  Device getDevice() const override { return device(); }
  void setDevice(Device d) const override { if (d.has_index()) place = d.index(); }
  void uncheckedSetDevice(Device d) const noexcept override { if (d.has_index()) place = d.index(); }
  DeviceIndex deviceCount() const noexcept override { return count; }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getDefaultStream(Device d) const override { return Stream(Stream::DEFAULT, d); }
  Stream exchangeStream(Stream s) const noexcept override { auto old = stream(); current = s.id(); return old; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
};
struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return count; }
  DeviceIndex getCurrentDevice() const override { return place; }
};
extern "C" {
void pretend(int devices) {
  const bool on = devices > 0;
  count = devices;
  static Guard guard;
  static Hooks ours;
  auto& hooks = *reinterpret_cast<void**>(const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks()));
  static void* theirs = hooks;
  hooks = on ? *reinterpret_cast<void**>(&ours) : theirs;
  impl::device_guard_impl_registry[1].store(on ? &guard : nullptr);
}
int device_index() { return place; }
void set_device(int i) { place = i; }
long stream_id() { return current; }
void set_stream(long id) { current = id; }
}
