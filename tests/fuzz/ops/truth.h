// What a call of the ops should return, in extended precision, and by how much a right result may differ.
#pragma once

#include <cstdint>
#include <vector>

namespace fastdpo::fuzz {

// The rounding of the arithmetic (half a unit in the last place, relative), and of what is stored.
struct Precision {
  double arithmetic;      // of the compute type
  double sums;            // of sums over the vocabulary, which are in float64 always
  double operand;         // of the exponentials that the gradients' products take
  double hidden, bias;    // of the gradients' types
  double least;           // the least normal number of the compute type; below it precision is absolute
  double hidden_least;    // of hidden's type
  double largest;         // the largest number of the compute type
  double hidden_largest;  // of hidden's type
  int roundings;          // how often an operand is rounded
};

struct Call {
  int64_t n, h, v;
  std::vector<double> hidden, weight, bias;  // bias is empty where there is none
  std::vector<int64_t> targets;
  int64_t ignore_index;
  double scale, softcap, temperature;
  std::vector<double> grad_logps;
};

// A number and its error bound; below 0 where nothing can be said of it.
struct Expected {
  double value = 0;
  double bound = -1;
};

struct Truth {
  std::vector<bool> scored;
  std::vector<bool> nan;  // rows whose log-probability has to be NaN
  std::vector<Expected> logps, entropy, log_sum_sq_probs, mean_logits, top_gap;
  std::vector<Expected> hidden, weight, bias;  // gradients
};

Truth truth_of(const Call& call, const Precision& precision);

}  // namespace fastdpo::fuzz
