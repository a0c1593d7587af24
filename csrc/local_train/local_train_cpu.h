// The fused engine on the CPU: a client's whole local training as one task that stays in its core's
// cache.
#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace fedpeft {

// Score of an item: user . (base + table + B a + sum of codewords + hashed rows), each part where
// it is given; with an MLP, MLP([user, the same sum]).
struct LocalTrainArgs {
  // Clients of the call, and everybody's training items as CSR rows.
  IndexArray clients;    // [C], in [0, U)
  IndexArray indptr;     // [U + 1]
  IndexArray items;      // [nnz], oldest first
  IndexArray positives;  // [nnz], ascending
  int64_t users, nnz, num_items, D;

  // Parameters at the start; null where the model has no such part.
  const void* user;   // [U, user_width]
  const void* base;   // [I, D], frozen
  const void* table;  // [I, D], trained
  const void *A, *B;  // [I, r], [D, r]
  int64_t rank;
  IndexArray codes;  // [I, L]
  const void* codebooks;
  int64_t L, K;
  const void* buckets;            // [M, D]
  const int64_t* hashes;          // [H, 2]
  const void *w1, *b1, *w2, *b2;  // SENet: [S, H], [S], [H, S], [H]
  int64_t M, H, S;
  bool mean;
  bool graph;  // FedPerGNN: (user + sum of the own items' vectors / sqrt(n)) / 2 is what scores
  int64_t user_width;      // D without an MLP
  int64_t layers;          // hidden ones of the MLP; 0: there is none
  const int64_t* widths;   // [layers]
  const void* const* mlp;  // [2 layers + 1]: weight [O, I] and bias [O] of each layer, output [O]
  bool own_mlp;            // one a client of the call, [C, ...], which stays with it
  bool drop;
  uint32_t drop_threshold;  // floor(p * 2^32): a hidden unit with a word below it is dropped
  double drop_scale;        // 1 / (1 - p)

  // Settings.
  int64_t epochs, batch;  // batch: positives of a step; 0 for all
  bool bpr, adam;         // else bce, sgd
  double lr, beta1, beta2, eps;
  double l2_user, l2_items;  // on rows with a gradient
  double prox;               // FedProx: prox / 2 * |w - start|^2 over what travels
  uint64_t seed;
  uint32_t round;

  // Results.
  void* new_user;  // [C, user_width]
  double* losses;  // [C]: mean over steps
  int64_t R;       // rows of item tables that a client may touch
  int64_t* rows;   // [C, R], -1 behind
  void* d_table;   // [C, R, D]
  void* d_A;       // [C, R, r]
  void* d_B;       // [C, D, r]
  void* d_codebooks;
  void* d_buckets;
  void *d_w1, *d_b1, *d_w2, *d_b2;
  void* const* d_mlp;  // [2 layers + 1] of [C, ...]: updates, or the new values of clients' own

  FirstError *bad_item, *bad_order;  // positions in items, in positives
  FirstError* no_negative;           // client id
  FirstError* bad_code;              // position in codes
};

// Which parts of the updates of a client are NaN or infinite: a bit each, in this order.
enum BrokenPart : uint32_t {
  broken_table,
  broken_A,
  broken_B,
  broken_codebooks,
  broken_buckets,
  broken_w1,
  broken_b1,
  broken_w2,
  broken_b2,
  broken_parts,  // those above
  broken_mlp = broken_parts
};

// Where a thread adds the updates of its clients in place of uploads; of parts that the model lacks
// null.
constexpr int64_t kTotalLocks = 16384;
struct LocalSums {
  double* totals[broken_parts];  // shapes of the parameters
  uint8_t* locks[broken_parts];  // [kTotalLocks], where other threads add to the same rows
  double* const* mlp;            // as LocalTrainArgs::mlp; no other thread adds there
  double shift;     // 1.5 * 2^52 * grid: x + shift - shift rounds x to the grid; 0 leaves x
  uint64_t* seen;   // bits [I]: rows of table and A that this thread added to; null: not asked
  int64_t* fresh;   // takes the rows that it had not, and is moved on
  uint32_t broken;  // bits of BrokenPart
};

struct LocalTrainKernels {
  // Bytes that training a client of n items needs (index by dtype: f32, f64), and its draws.
  int64_t (*scratch[2])(const LocalTrainArgs&, int64_t n);
  int64_t (*draws_room)(const LocalTrainArgs&, int64_t n);
  // Asks memory for what `draw` of client c of the call will read.
  void (*ask)(const LocalTrainArgs&, int64_t c);
  // Makes the draws of client c.
  void (*draw)(const LocalTrainArgs&, int64_t c, void* room);
  // Trains client c on its draws, and writes its upload or adds it, with its weight, to the sums.
  // `ahead`: draws of the client to be trained next, whose rows are asked for; or null.
  void (*train[2])(const LocalTrainArgs&, int64_t c, const void* draws, const void* ahead,
                   void* scratch, LocalSums* sums, double weight);
};

// The wide ones are for training with an MLP.
FEDPEFT_DECLARE_KERNELS(LocalTrainKernels, local_train_kernels)
FEDPEFT_DECLARE_WIDE_KERNELS(LocalTrainKernels, local_train_kernels)

inline const LocalTrainKernels& local_train_kernels_for(const LocalTrainArgs& a) {
  return a.layers ? select_wide_local_train_kernels() : select_local_train_kernels();
}

}  // namespace fedpeft
