// Small kernels with a fault planted in each, beside their correct twins, to show that the emulator
// catches it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fedpeft::emulator {

std::vector<std::string> fault_names();

// Runs the kernel `name`, with its fault or without, and returns what it computed.
std::vector<int64_t> run_fault(const std::string& name, bool planted);

}  // namespace fedpeft::emulator
