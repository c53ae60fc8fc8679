// index v2: as v1, but the batch and the GPU decide how finely a row is split.
//
// Idea: a group of LANES lanes moves one piece of LANES × WORK vectors. Small batches take WORK = 1, which spreads even
// one row over several multiprocessors; large ones take more, which keeps more loads in flight for each id fetched.
#include "common.cuh"

extern "C" __global__ void index_v2(char* out, int64 out_stride, const char* table, int64 table_stride, const ID_T* ids,
                                    int64 start, int64 length, int64 tokens) {
  constexpr int kVecs = ROW_BYTES / VEC, kPieces = ceil_div(kVecs, LANES * WORK);
  const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x, group = thread / LANES;
  const int64 row = group / kPieces;
  const int first = group % kPieces * (LANES * WORK) + thread % LANES;
  pdl::trigger();
  if (row < tokens) prefetch(ids + row);
  pdl::wait();
  if (row >= tokens) return;
  const int64 id = ids[row] - start;
  warp::Piece<VEC, LANES, WORK> piece = {};
  if (static_cast<uint64>(id) < static_cast<uint64>(length)) {
    piece.template load<true>(table + id * table_stride, first, kVecs);
  }
  piece.store(out + row * out_stride, first, kVecs);
}
