// The sample of a round's clients, for bindings of ops that draw it themselves.
#pragma once

#include "common/check.h"

namespace fedpeft {

// `count` of `clients` [n], as the op sample_clients draws them: int64, ascending.
Tensor sample_clients_on_cpu(const Tensor& clients, int64_t count, int64_t seed, int64_t round,
                             int64_t attempt);

}  // namespace fedpeft
