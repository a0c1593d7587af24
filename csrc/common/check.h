// Argument checks and tensor views for the binding files. Messages name the argument, what was
// expected and what came; std::invalid_argument reaches Python as ValueError, std::out_of_range as
// IndexError.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/torch.h"
#include "common/types.h"

namespace fedpeft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] void throw_type_error(const std::string& message);  // Python's TypeError

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  ((out << parts), ...);
  return out.str();
}

template <typename... Parts>
void check_value(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    throw std::invalid_argument(text(parts...));
}

template <typename... Parts>
void check_type(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    throw_type_error(text(parts...));
}

// A shape in a message. Written out when the message is: most checks pass, and a stream costs more
// than all that a small call has to do.
template <typename Sizes>
struct ShapeText {
  const Sizes& sizes;
};

inline int64_t dims_of(const Tensor& t) { return t.dim(); }
inline int64_t size_of(const Tensor& t, int64_t d) { return t.size(d); }
inline int64_t dims_of(const std::vector<int64_t>& shape) { return int64_t(shape.size()); }
inline int64_t size_of(const std::vector<int64_t>& shape, int64_t d) { return shape[size_t(d)]; }

template <typename Sizes>
std::ostream& operator<<(std::ostream& out, const ShapeText<Sizes>& shape) {
  out << '[';
  for (int64_t d = 0; d < dims_of(shape.sizes); ++d)
    out << (d ? ", " : "") << size_of(shape.sizes, d);
  return out << ']';
}

template <typename Sizes>
ShapeText<Sizes> shape_text(const Sizes& sizes) {
  return {sizes};
}

template <typename Sizes>
bool has_shape(const Tensor& t, const Sizes& sizes) {
  bool ok = t.dim() == dims_of(sizes);
  for (int64_t d = 0; ok && d < t.dim(); ++d) ok = t.size(d) == size_of(sizes, d);
  return ok;
}

inline void check_dim(const Tensor& t, int64_t dim, const char* name, const char* shape) {
  check_value(t.dim() == dim, name, ": expected shape ", shape, ", got ", shape_text(t));
}

inline void check_size(const Tensor& t, int64_t dim, int64_t size, const char* name,
                       const char* meaning) {
  check_value(t.size(dim) == size, name, ": expected size ", size, " (", meaning, ") in dimension ",
              dim, ", got shape ", shape_text(t));
}

inline void check_same_shape(const Tensor& t, const Tensor& like, const char* name,
                             const char* like_name) {
  check_value(has_shape(t, like), name, ": expected the shape of ", like_name, " ",
              shape_text(like), ", got ", shape_text(t));
}

// A number in [0, limit).
inline uint32_t check_uint(int64_t value, int64_t limit, const char* name) {
  check_value(value >= 0 && value < limit, name, ": expected 0 to ", limit - 1, ", got ", value);
  return uint32_t(value);
}

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      throw_type_error(text(name, ": expected float32, float64, float16 or bfloat16, got ",
                            torch::headeronly::toString(t.scalar_type())));
  }
}

inline void check_same_dtype(const Tensor& t, const Tensor& like, const char* name,
                             const char* like_name) {
  check_type(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of ", like_name,
             " (", torch::headeronly::toString(like.scalar_type()), "), got ",
             torch::headeronly::toString(t.scalar_type()));
}

inline void check_float64(const Tensor& t, const char* name) {
  check_type(t.scalar_type() == ScalarType::Double, name, ": expected float64, got ",
             torch::headeronly::toString(t.scalar_type()));
}

// x + shift - shift rounds x to the grid: 1.5 * 2^52 * grid, 0 for no grid.
inline double shift_of(double grid) {
  check_value(grid >= 0.0 && std::isfinite(grid), "grid: expected 0 or a power of two, got ", grid);
  return 0x1.8p52 * grid;
}

inline void check_same_device(const Tensor& t, const Tensor& like, const char* name,
                              const char* like_name) {
  check_value(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(),
              name, ": expected the device of ", like_name);
}

// A table [..., rows, D] that items are sent into has some.
inline void check_rows(const Tensor& t, const char* name) {
  check_value(t.size(t.dim() - 2) > 0, name, ": expected at least one row, got ", shape_text(t));
}

inline void check_rank(const Tensor& A) {
  check_value(A.size(A.dim() - 1) > 0, "A: expected a rank of at least 1, got shape ",
              shape_text(A));
}

inline void check_hashes(const Tensor& hashes) {
  check_value(hashes.dim() == 2 && hashes.size(1) == 2 && hashes.size(0) > 0,
              "hashes: expected shape [H, 2] with H > 0, got ", shape_text(hashes));
  check_type(hashes.scalar_type() == ScalarType::Long, "hashes: expected int64, got ",
             torch::headeronly::toString(hashes.scalar_type()));
}

// float64 [C], one weight a client.
inline void check_weights(const Tensor& weights, int64_t C, const Tensor& like,
                          const char* like_name) {
  check_dim(weights, 1, "weights", "[C]");
  check_size(weights, 0, C, "weights", "C, the clients");
  check_float64(weights, "weights");
  check_same_device(weights, like, "weights", like_name);
}

// Views; the tensor must be contiguous and outlive them.
inline IndexArray indices_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Long:
      return {t.const_data_ptr(), 8};
    case ScalarType::Int:
      return {t.const_data_ptr(), 4};
    default:
      throw_type_error(text(name, ": expected int32 or int64, got ",
                            torch::headeronly::toString(t.scalar_type())));
  }
}

inline IndexArray codes_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Byte:
      return {t.const_data_ptr(), 1};
    case ScalarType::Short:
      return {t.const_data_ptr(), 2};
    case ScalarType::Int:
      return {t.const_data_ptr(), 4};
    case ScalarType::Long:
      return {t.const_data_ptr(), 8};
    default:
      throw_type_error(text(name, ": expected uint8, int16, int32 or int64, got ",
                            torch::headeronly::toString(t.scalar_type())));
  }
}

// An uninitialised tensor where `like` is, of its type where none is given. Straight from the
// allocator: torch::stable::new_empty looks its op up by name at each call, which may take longer
// than the rest of a small call.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                       std::optional<ScalarType> dtype = std::nullopt) {
  int32_t device_type = 0, device_index = 0, type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  if (dtype) {
    type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  }
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(shape[d], 1))
    strides[d] = stride;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(shape.size()), shape.data(), strides.data(), type, device_type, device_index, &made));
  return Tensor(made);
}

inline Tensor allocate_like(const Tensor& t) { return allocate(t, t.sizes()); }

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  if (!t.has_value()) return std::nullopt;
  return dense(*t);
}

// Gradients of 16-bit parameters are accumulated in float32 and converted once at the end.
inline ScalarType accumulator_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

inline void raise_bad_index(const FirstError& error, const IndexArray& indices, int64_t size,
                            const char* name) {
  if (error.any()) [[unlikely]] {
    throw std::out_of_range(text(name, ": index ", indices[error.position], " at position ",
                                 error.position, " is out of range: expected -1 (padding) or 0 to ",
                                 size - 1));
  }
}

[[noreturn]] inline void throw_bad_client(int64_t client, int64_t c, int64_t users) {
  throw std::out_of_range(text("clients: id ", client, " at position ", c,
                               " is out of range: expected 0 to ", users - 1));
}

// Client ids in [0, users); on the CPU, where values can be read.
inline void check_clients(const IndexArray& clients, int64_t count, int64_t users) {
  for (int64_t c = 0; c < count; ++c) {
    if (clients[c] < 0 || clients[c] >= users) [[unlikely]]
      throw_bad_client(clients[c], c, users);
  }
}

// Code `code` at flat position `at` of codes [I, L] is not in [0, K).
[[noreturn]] inline void throw_bad_code(int64_t code, int64_t at, int64_t L, int64_t K) {
  throw std::out_of_range(text("codes: code ", code, " of item ", at / L, " at level ", at % L,
                               " is out of range: expected 0 to ", K - 1));
}

inline void raise_bad_code(const FirstError& error, const IndexArray& codes, int64_t L, int64_t K) {
  if (error.any()) [[unlikely]]
    throw_bad_code(codes[error.position], error.position, L, K);
}

// How positions map to parameters: with per-client parameters `items` is [C, P], without them any
// shape is one "client" of all its positions.
struct Layout {
  int64_t clients;
  int64_t positions;  // a client
  bool per_client;
  int64_t total() const { return clients * positions; }
};

inline Layout layout_of(const Tensor& items, bool per_client, int64_t clients,
                        const char* items_name, const char* parameter) {
  if (!per_client) return {1, items.numel(), false};
  check_value(items.dim() == 2 && items.size(0) == clients, items_name,
              ": expected shape [C, P] with C = ", clients, " as in ", parameter, ", got ",
              shape_text(items));
  return {clients, items.size(1), true};
}

inline std::vector<int64_t> output_shape(const Tensor& items, int64_t width) {
  std::vector<int64_t> shape;
  shape.reserve(size_t(items.dim()) + 1);
  for (int64_t d = 0; d < items.dim(); ++d) shape.push_back(items.size(d));
  shape.push_back(width);
  return shape;
}

inline void check_base(const std::optional<Tensor>& base, int64_t items, int64_t width,
                       const Tensor& parameter, const char* parameter_name) {
  if (!base.has_value()) return;
  check_dim(*base, 2, "base", "[I, D]");
  if (items >= 0) check_size(*base, 0, items, "base", "I, the number of items");
  check_size(*base, 1, width, "base", "D, the width");
  check_same_dtype(*base, parameter, "base", parameter_name);
  check_same_device(*base, parameter, "base", parameter_name);
}

// The gradient of a lookup's output: items.shape + [D].
inline void check_grad(const Tensor& grad, const Tensor& items) {
  bool ok = grad.dim() == items.dim() + 1;
  for (int64_t d = 0; ok && d < items.dim(); ++d) ok = grad.size(d) == items.size(d);
  check_value(ok, "grad: expected the shape of items ", shape_text(items), " with D behind, got ",
              shape_text(grad));
}

}  // namespace fedpeft
