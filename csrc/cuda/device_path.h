// Whether a device runs the captured graph or the decoder's ATen path, and why. No CUDA header: the choice is a
// function of what the CUDA runtime says.
#pragma once

#include <string>

namespace e3::cuda {

struct DeviceFacts {
  enum Kernels { found, no_image, ptx_too_new };
  int capability;          // 90 for sm_90
  int driver;              // 12040: the driver serves CUDA 12.4
  Kernels kernels;         // whether the module's kernels load there
  int ptx = 0, binary = 0;  // the targets of the code that was found: its PTX, and what runs
};

struct DevicePath {
  bool graph;
  std::string reason;
};

inline DevicePath choose_path(const DeviceFacts& facts) {
  const std::string device = "sm_" + std::to_string(facts.capability);
  const std::string driver = std::to_string(facts.driver / 1000) + "." + std::to_string(facts.driver % 1000 / 10);
  if (facts.driver < 12040) return {false, "the driver serves CUDA " + driver + "; conditional graph nodes need 12.4"};
  if (facts.kernels == DeviceFacts::no_image) return {false, "the module holds no code for " + device};
  if (facts.kernels == DeviceFacts::ptx_too_new)
    return {false, "the module's PTX for " + device + " is newer than the driver's CUDA " + driver +
                       "; update the driver, or build with a toolkit of that version"};
  if (facts.ptx == facts.binary) return {true, "code for sm_" + std::to_string(facts.binary)};
  return {true, "compiled by the driver for " + device + " from PTX of compute_" + std::to_string(facts.ptx)};
}

}  // namespace e3::cuda
