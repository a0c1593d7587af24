// A hidden layer of each client's own MLP on the GPU; the arguments are those of the CPU, of which
// `packed`, `scratch` and `tasks` are not used.
#pragma once

#include "client_layer/client_layer_cpu.h"
#include "common/gpu.h"

namespace fedpeft::gpu {

void client_layer(const ClientLayerArgs& a, DType dtype, int64_t clients, Stream stream);
void client_layer_backward(const ClientLayerArgs& a, DType dtype, int64_t clients, Stream stream);

}  // namespace fedpeft::gpu
