// What host code and .cu files share: the stream that a kernel is launched on.
#pragma once

namespace fedpeft::gpu {

struct Stream {
  void* handle = nullptr;  // cudaStream_t; nothing in the emulator
};

}  // namespace fedpeft::gpu
