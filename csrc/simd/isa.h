// Which of the compiled instruction sets this machine runs.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace e3 {

enum class Isa : int { baseline, avx2, avx512, avx512_bf16, amx };

inline constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)

// XCR0: the register state that the operating system saves; without it the instructions fault whatever CPUID says.
inline uint64_t extended_control_register() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

// Linux gives the tiles' 8 KiB of state only to processes that ask for it.
inline bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The widest instruction set that both the processor (CPUID) and the operating system (XGETBV) support.
inline Isa detect_isa() {
  constexpr uint32_t kFma = 1u << 12, kOsxsave = 1u << 27, kF16c = 1u << 29;                         // leaf 1, ecx
  constexpr uint32_t kAvx2 = 1u << 5, kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;  // leaf 7.0, ebx
  constexpr uint32_t kAmx = 1u << 22 | 1u << 24;  // leaf 7.0, edx
  constexpr uint32_t kBf16 = 1u << 5;  // leaf 7.1, eax
  constexpr uint64_t kYmmState = 0x6, kZmmState = 0xe6, kTileState = 0x60000;
  uint32_t eax, ebx, ecx, edx;
  const auto has = [](uint32_t word, uint32_t bits) { return (word & bits) == bits; };
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !has(ecx, kFma | kOsxsave | kF16c)) return Isa::baseline;
  const uint64_t state = extended_control_register();
  if ((state & kYmmState) != kYmmState) return Isa::baseline;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !has(ebx, kAvx2)) return Isa::baseline;
  if ((state & kZmmState) != kZmmState || !has(ebx, kF | kDq | kBw | kVl)) return Isa::avx2;
  const bool tiles = has(edx, kAmx) && (state & kTileState) == kTileState;
  if (eax < 1 || !__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !has(eax, kBf16)) return Isa::avx512;
  return tiles && may_use_tiles() ? Isa::amx : Isa::avx512_bf16;
}

#else

inline Isa detect_isa() { return Isa::baseline; }

#endif

// The widest instruction set that this machine runs; the environment's E3_ISA asks for a narrower one.
inline Isa wanted_isa() {
  const Isa widest = detect_isa();
  const char* wanted = std::getenv("E3_ISA");
  if (wanted == nullptr || *wanted == '\0') return widest;
  for (int isa = 0; isa <= static_cast<int>(widest); ++isa) {
    if (std::string(kIsaNames[isa]) == wanted) return static_cast<Isa>(isa);
  }
  throw std::invalid_argument(std::string("E3_ISA=") + wanted + ": this machine runs baseline to " +
                              kIsaNames[static_cast<int>(widest)]);
}

}  // namespace e3
