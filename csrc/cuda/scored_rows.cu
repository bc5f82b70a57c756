#include "dispatch.cuh"
#include "scored_rows.cuh"

namespace fastdpo::cuda {
namespace {

template <typename C>
RowResults<C> results_in(const ResultPointers& r) {
  return {static_cast<C*>(r.logps),
          static_cast<C*>(r.row_state),
          static_cast<C*>(r.direction),
          static_cast<C*>(r.entropy),
          static_cast<C*>(r.log_sum_sq_probs),
          static_cast<C*>(r.mean_logits),
          static_cast<C*>(r.top_gap),
          r.positions,
          r.hidden_units};
}

template <typename Word>
void gather_words(const void* from, const int64_t* rows, int64_t count, int64_t row_bytes, void* to, void* stream) {
  launch_kernel("gather_rows", gather_rows_kernel<Word>, count, kBlockThreads, stream, static_cast<const Word*>(from),
                rows, row_bytes / static_cast<int64_t>(sizeof(Word)), static_cast<Word*>(to));
}

}  // namespace

void partition_rows(const int64_t* targets, int64_t count, int64_t ignore_index, int64_t vocabulary, int64_t* rows,
                    int64_t* facts, void* stream) {
  static_assert(sizeof(TargetFacts) == kTargetFactsSize * sizeof(int64_t));
  launch_kernel("partition_rows", partition_rows_kernel, 1, PartitionTraits::kThreads, stream, targets, count,
                ignore_index, vocabulary, rows, reinterpret_cast<TargetFacts*>(facts));
}

void gather_rows(const void* from, const int64_t* rows, int64_t count, int64_t row_bytes, void* to, void* stream) {
  const auto ends = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) | row_bytes;
  if (ends % sizeof(uint4) == 0) {
    gather_words<uint4>(from, rows, count, row_bytes, to, stream);
  } else if (ends % sizeof(uint32_t) == 0) {
    gather_words<uint32_t>(from, rows, count, row_bytes, to, stream);
  } else {
    gather_words<uint16_t>(from, rows, count, row_bytes, to, stream);
  }
}

void start_rows(const StartRowsArguments& a, void* stream) {
  with_type(a.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = typename ComputeOf<T>::type;
    const StartRows<T> work{static_cast<const T*>(a.hidden),
                            static_cast<const T*>(a.weight),
                            static_cast<const C*>(a.bias),
                            a.targets,
                            a.rows,
                            a.count,
                            a.hidden_units,
                            a.vocabulary,
                            a.ignore_index,
                            transform_in<C>(a.transform),
                            static_cast<RowSums<C>*>(a.sums),
                            a.row_targets};
    constexpr int64_t kRowsPerBlock = kBlockThreads / kWarpSize;
    launch_kernel("start_rows", start_rows_kernel<T>, (a.count + kRowsPerBlock - 1) / kRowsPerBlock, kBlockThreads,
                  stream, work);
  });
}

void finish_rows(const FinishRowsArguments& a, void* stream) {
  with_type(a.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using O = typename OperandOf<T>::type;
    using C = typename ComputeOf<T>::type;
    const FinishRows<T, O> work{static_cast<const RowSums<C>*>(a.sums),
                                a.targets,
                                a.rows,
                                a.first_position,
                                a.ignore_index,
                                a.vocabulary,
                                static_cast<const T*>(a.weight),
                                static_cast<const C*>(a.accumulated),
                                static_cast<O*>(a.retained),
                                transform_in<C>(a.transform),
                                results_in<C>(a.results)};
    launch_kernel("finish_rows", finish_rows_kernel<T, O>, a.count, kBlockThreads, stream, work);
  });
}

void fill_rows(Type type, const int64_t* targets, int64_t ignore_index, const int64_t* rows, int64_t count,
               const ResultPointers& results, void* stream) {
  if (compute_type(type) == Type::kFloat64) {
    launch_kernel("fill_rows", fill_rows_kernel<double>, count, kBlockThreads, stream, targets, ignore_index, rows,
                  results_in<double>(results));
  } else {
    launch_kernel("fill_rows", fill_rows_kernel<float>, count, kBlockThreads, stream, targets, ignore_index, rows,
                  results_in<float>(results));
  }
}

}  // namespace fastdpo::cuda
