// The whole op surface: schemas only. Implementations register themselves in <op>/<op>.cpp.
#include "common/dispatch.h"

STABLE_TORCH_LIBRARY(FEDPEFT_LIBRARY, m) {
  // Lookups: items [*] or [C, P] -> items.shape + [D]; -1 is padding.
  m.def("rq_lookup(Tensor items, Tensor codes, Tensor codebooks, Tensor? base) -> Tensor");
  m.def(
      "rq_lookup_backward(Tensor grad, Tensor items, Tensor codes, SymInt codebook_size, bool "
      "per_client) "
      "-> Tensor");
  m.def("hash_buckets(Tensor items, Tensor hashes, SymInt table_size) -> Tensor");
  m.def(
      "hash_lookup(Tensor items, Tensor table, Tensor hashes, Tensor? w1, Tensor? b1, Tensor? w2, "
      "Tensor? b2, bool mean, Tensor? base) -> Tensor");
  m.def(
      "hash_lookup_backward(Tensor grad, Tensor items, Tensor table, Tensor hashes, Tensor? w1, "
      "Tensor? b1, Tensor? w2, Tensor? b2, bool mean) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("lora_lookup(Tensor items, Tensor A, Tensor B, Tensor? base, Tensor? rows) -> Tensor");
  m.def("lora_lookup_backward(Tensor grad, Tensor rows, Tensor A, Tensor B) -> (Tensor, Tensor)");
  m.def("client_embedding(Tensor rows, Tensor weight) -> Tensor");
  m.def(
      "client_embedding_backward(Tensor grad, Tensor rows, SymInt num_rows, bool per_client) -> "
      "Tensor");

  // Scores and losses of padded clients: [(C,) P, D], [(C,) P].
  m.def("dot_scores(Tensor vectors, Tensor user) -> Tensor");
  m.def("dot_scores_backward(Tensor grad, Tensor vectors, Tensor user) -> (Tensor, Tensor)");
  m.def(
      "client_layer(Tensor x, Tensor weight, Tensor bias, Tensor items, Tensor clients, float p, "
      "int seed, int round, int epoch, int layer) -> Tensor");
  m.def(
      "client_layer_backward(Tensor grad, Tensor x, Tensor weight, Tensor out, Tensor items, float "
      "p) -> (Tensor, Tensor, Tensor)");
  m.def(
      "client_mlp(Tensor x, Tensor[] weights, Tensor[] biases, Tensor output, Tensor items, Tensor "
      "clients, float p, int seed, int round, int epoch) -> (Tensor, Tensor)");
  m.def(
      "client_mlp_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor output, Tensor hidden, "
      "Tensor items, float p) -> (Tensor, Tensor[], Tensor[], Tensor)");
  m.def("bpr_loss(Tensor positive, Tensor negative, Tensor items) -> Tensor");
  m.def(
      "bpr_loss_backward(Tensor grad, Tensor positive, Tensor negative, Tensor items) -> (Tensor, "
      "Tensor)");
  m.def("bce_loss(Tensor positive, Tensor negative, Tensor items) -> Tensor");
  m.def(
      "bce_loss_backward(Tensor grad, Tensor positive, Tensor negative, Tensor items) -> (Tensor, "
      "Tensor)");

  // Optimizer steps over stacked per-client parameters [C, ...].
  m.def(
      "client_adam_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
      "Tensor steps, "
      "float lr, float beta1, float beta2, float eps, float l2) -> ()");
  m.def(
      "client_sgd_(Tensor(a!) param, Tensor grad, Tensor(b!)? momentum_buffer, float lr, float "
      "momentum, "
      "float l2) -> ()");

  // Counter-based draws: functions of (seed, round, client, position) alone.
  m.def(
      "sample_negatives(Tensor items, Tensor clients, Tensor indptr, Tensor indices, int "
      "num_items, "
      "int epochs, int seed, int round) -> Tensor");
  m.def(
      "client_dropout(Tensor x, Tensor clients, float p, int seed, int round, int epoch, int "
      "layer) "
      "-> Tensor");

  // A client's whole local training: its draws, epochs, gradients and optimizer, from the global
  // parameters to its upload.
  m.def(
      "local_train(Tensor clients, Tensor indptr, Tensor items, Tensor positives, SymInt "
      "num_items, Tensor user, "
      "Tensor? base, Tensor? table, Tensor? A, Tensor? B, Tensor? codes, Tensor? codebooks, "
      "Tensor? buckets, "
      "Tensor? hashes, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor[] mlp, float "
      "dropout, "
      "bool mean, bool graph, int epochs, int "
      "batch_size, "
      "bool bpr, bool adam, float lr, float beta1, float beta2, float eps, float l2_user, float "
      "l2_items, "
      "float prox, int seed, int round) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor[])");
  // The same, with the uploads added to sums.
  m.def(
      "local_train_sum_(Tensor clients, Tensor weights, Tensor indptr, Tensor items, Tensor "
      "positives, SymInt num_items, Tensor user, Tensor? base, Tensor? table, Tensor? A, "
      "Tensor? B, Tensor? codes, Tensor? codebooks, Tensor? buckets, Tensor? hashes, Tensor? "
      "w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor[] mlp, float dropout, "
      "Tensor(a!)? sum_table, Tensor(b!)? sum_A, "
      "Tensor(c!)? sum_B, Tensor(d!)? sum_codebooks, Tensor(e!)? sum_buckets, Tensor(f!)? "
      "sum_w1, Tensor(g!)? sum_b1, Tensor(h!)? sum_w2, Tensor(i!)? sum_b2, Tensor(k!)[] sum_mlp, "
      "Tensor(j!)? touched, bool mean, bool graph, int epochs, int batch_size, bool bpr, bool "
      "adam, float lr, float "
      "beta1, "
      "float beta2, float eps, float l2_user, float l2_items, float prox, int seed, int round, "
      "float grid) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // A whole round: the choice of clients, the same, and the server's step.
  m.def(
      "train_round_(Tensor clients, int count, bool by_items, float server_lr, Tensor indptr, "
      "Tensor items, Tensor positives, SymInt num_items, Tensor(a!) user, Tensor? base, "
      "Tensor(b!)? table, Tensor(c!)? A, Tensor(d!)? B, Tensor? codes, Tensor(e!)? codebooks, "
      "Tensor(f!)? buckets, Tensor? hashes, Tensor(g!)? w1, Tensor(h!)? b1, Tensor(i!)? w2, "
      "Tensor(j!)? b2, Tensor(k!)[] mlp, float dropout, Tensor(l!)? sum_table, Tensor(m!)? sum_A, "
      "Tensor(n!)? sum_B, Tensor(o!)? sum_codebooks, Tensor(p!)? sum_buckets, Tensor(q!)? sum_w1, "
      "Tensor(r!)? sum_b1, Tensor(s!)? sum_w2, Tensor(t!)? sum_b2, Tensor(u!)[] sum_mlp, "
      "bool mean, bool graph, int epochs, int batch_size, bool bpr, bool adam, float lr, "
      "float beta1, float beta2, float eps, float l2_user, float l2_items, float prox, int seed, "
      "int round, int attempt) -> (Tensor, Tensor, Tensor)");

  // Between clients and the server.
  m.def("touched_rows(Tensor items) -> (Tensor, Tensor)");
  m.def(
      "accumulate_updates_(Tensor(a!) total, Tensor updates, Tensor weights, Tensor? rows,"
      " float grid=0.0) -> ()");

  m.def("apply_updates_(Tensor(a!) parameter, Tensor(b!) total, Tensor? rows, float scale) -> ()");
  m.def("sample_clients(Tensor clients, int count, int seed, int round, int attempt) -> Tensor");
  m.def(
      "sample_clients_independently(Tensor clients, float probability, int seed, int round, "
      "int attempt) -> Tensor");

  m.def("rq_encode(Tensor x, Tensor codebooks) -> Tensor");
}
