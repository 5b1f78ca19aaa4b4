// Stands in for cuSPARSELt on a machine without a GPU: the calls that the handler of
// pallas_kernels/two_of_four makes, done on the CPU after the library's documentation, bfloat16
// alone. The weights really are compressed: what is not 2:4 along the contracted axis is an error.

#include <cusparseLt.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Matrix {
  int64_t rows, cols, ld;
  cusparseOrder_t order;
  bool sparse;
  int64_t at(int64_t row, int64_t col) const {
    return order == CUSPARSE_ORDER_ROW ? row * ld + col : col * ld + row;
  }
  bool fits() const {
    return rows > 0 && cols > 0 && ld == (order == CUSPARSE_ORDER_ROW ? cols : rows);
  }
};
struct Product {
  Matrix a, b, c;
  bool transposed_a, transposed_b;
  int64_t outer() const { return transposed_a ? a.cols : a.rows; }
  int64_t inner() const { return transposed_a ? a.rows : a.cols; }
  int64_t columns() const { return transposed_b ? b.rows : b.cols; }
};
struct Plan {
  const Product* product;  // as the library may: descriptors must outlive plans
  int64_t workspace;
};
struct Kept {
  uint16_t value[2];
  uint8_t place[2];
};

template <typename T, typename Opaque>
T& as(Opaque* opaque) {
  static_assert(sizeof(T) <= sizeof(Opaque));
  return *reinterpret_cast<T*>(opaque);
}
template <typename T, typename Opaque>
const T& as(const Opaque* opaque) {
  return *reinterpret_cast<const T*>(opaque);
}

float wide(uint16_t bits) {
  const uint32_t whole = uint32_t(bits) << 16;
  float out;
  std::memcpy(&out, &whole, 4);
  return out;
}

uint16_t narrow(float value) {  // to the nearest, ties to even
  uint32_t whole;
  std::memcpy(&whole, &value, 4);
  return uint16_t((whole + 0x7FFF + (whole >> 16 & 1)) >> 16);
}

cusparseStatus_t describe(cusparseLtMatDescriptor_t* out, Matrix matrix, uint32_t alignment,
                          cudaDataType type) {
  if (type != CUDA_R_16BF) return CUSPARSE_STATUS_NOT_SUPPORTED;
  if (!matrix.fits() || alignment % 16) return CUSPARSE_STATUS_INVALID_VALUE;
  as<Matrix>(out) = matrix;
  return CUSPARSE_STATUS_SUCCESS;
}

int plans_made = 0, searches = 0;

}  // namespace

extern "C" {

int StandInPlans() { return plans_made; }
int StandInSearches() { return searches; }

cusparseStatus_t cusparseLtInit(cusparseLtHandle_t*) { return CUSPARSE_STATUS_SUCCESS; }

cusparseStatus_t cusparseLtGetProperty(libraryPropertyType property, int* value) {
  *value = property == MAJOR_VERSION   ? CUSPARSELT_VER_MAJOR
           : property == MINOR_VERSION ? CUSPARSELT_VER_MINOR + SHIFT
                                       : 0;
  return CUSPARSE_STATUS_SUCCESS;
}

const char* cusparseLtGetErrorName(cusparseStatus_t status) {
  return status == CUSPARSE_STATUS_NOT_SUPPORTED ? "NOT_SUPPORTED" : "OTHER";
}
const char* cusparseLtGetErrorString(cusparseStatus_t) { return "by the stand-in"; }

cusparseStatus_t cusparseLtDenseDescriptorInit(const cusparseLtHandle_t*,
                                               cusparseLtMatDescriptor_t* out, int64_t rows,
                                               int64_t cols, int64_t ld, uint32_t alignment,
                                               cudaDataType type, cusparseOrder_t order) {
  return describe(out, {rows, cols, ld, order, false}, alignment, type);
}

cusparseStatus_t cusparseLtStructuredDescriptorInit(const cusparseLtHandle_t*,
                                                    cusparseLtMatDescriptor_t* out, int64_t rows,
                                                    int64_t cols, int64_t ld, uint32_t alignment,
                                                    cudaDataType type, cusparseOrder_t order,
                                                    cusparseLtSparsity_t) {
  return describe(out, {rows, cols, ld, order, true}, alignment, type);
}

cusparseStatus_t cusparseLtMatmulDescriptorInit(
    const cusparseLtHandle_t*, cusparseLtMatmulDescriptor_t* out, cusparseOperation_t on_a,
    cusparseOperation_t on_b, const cusparseLtMatDescriptor_t* a,
    const cusparseLtMatDescriptor_t* b, const cusparseLtMatDescriptor_t* c,
    const cusparseLtMatDescriptor_t* d, cusparseComputeType compute) {
  const Product product{as<Matrix>(a), as<Matrix>(b), as<Matrix>(c),
                        on_a == CUSPARSE_OPERATION_TRANSPOSE, on_b == CUSPARSE_OPERATION_TRANSPOSE};
  const int64_t inner = product.transposed_b ? product.b.cols : product.b.rows;
  if (c != d || compute != CUSPARSE_COMPUTE_32F || !product.a.sparse || product.b.sparse ||
      product.inner() != inner || product.outer() != product.c.rows ||
      product.columns() != product.c.cols)
    return CUSPARSE_STATUS_INVALID_VALUE;
  as<Product>(out) = product;
  return CUSPARSE_STATUS_SUCCESS;
}

cusparseStatus_t cusparseLtMatmulAlgSelectionInit(const cusparseLtHandle_t*,
                                                  cusparseLtMatmulAlgSelection_t*,
                                                  const cusparseLtMatmulDescriptor_t*,
                                                  cusparseLtMatmulAlg_t) {
  return CUSPARSE_STATUS_SUCCESS;
}

cusparseStatus_t cusparseLtMatmulPlanInit(const cusparseLtHandle_t*, cusparseLtMatmulPlan_t* out,
                                          const cusparseLtMatmulDescriptor_t* product,
                                          const cusparseLtMatmulAlgSelection_t*) {
  as<Plan>(out) = {&as<Product>(product), 64};
  ++plans_made;
  return CUSPARSE_STATUS_SUCCESS;
}

cusparseStatus_t cusparseLtMatmulGetWorkspace(const cusparseLtHandle_t*,
                                              const cusparseLtMatmulPlan_t* plan, size_t* bytes) {
  *bytes = as<Plan>(plan).workspace;
  return CUSPARSE_STATUS_SUCCESS;
}

cusparseStatus_t cusparseLtSpMMACompressedSize(const cusparseLtHandle_t*,
                                               const cusparseLtMatmulPlan_t* plan,
                                               size_t* compressed, size_t* buffer) {
  const Product& product = *as<Plan>(plan).product;
  *compressed = product.outer() * product.inner() / 4 * sizeof(Kept), *buffer = 0;
  return CUSPARSE_STATUS_SUCCESS;
}

cusparseStatus_t cusparseLtSpMMACompress(const cusparseLtHandle_t*,
                                         const cusparseLtMatmulPlan_t* plan, const void* dense,
                                         void* compressed, void*, cudaStream_t) {
  const Product& product = *as<Plan>(plan).product;
  const uint16_t* values = static_cast<const uint16_t*>(dense);
  Kept* out = static_cast<Kept*>(compressed);
  for (int64_t i = 0; i < product.outer(); ++i)
    for (int64_t run = 0; run < product.inner() / 4; ++run, ++out) {
      *out = {};
      int kept = 0;
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t k = 4 * run + j;
        const uint16_t value =
            values[product.transposed_a ? product.a.at(k, i) : product.a.at(i, k)];
        if (!(value & 0x7FFF)) continue;
        if (kept == 2) return CUSPARSE_STATUS_INVALID_VALUE;
        out->value[kept] = value, out->place[kept] = uint8_t(j), ++kept;
      }
    }
  return CUSPARSE_STATUS_SUCCESS;
}

cusparseStatus_t cusparseLtMatmul(const cusparseLtHandle_t*, const cusparseLtMatmulPlan_t* plan,
                                  const void* alpha, const void* a, const void* b, const void* beta,
                                  const void* c, void* d, void* workspace, cudaStream_t* streams,
                                  int32_t count) {
  const Product& product = *as<Plan>(plan).product;
  const float scale = *static_cast<const float*>(alpha);
  if (*static_cast<const float*>(beta) != 0 || c != d || count != 1 || !streams || !workspace)
    return CUSPARSE_STATUS_INVALID_VALUE;
  std::memset(workspace, 0xFF, as<Plan>(plan).workspace);
  const Kept* kept = static_cast<const Kept*>(a);
  const uint16_t* x = static_cast<const uint16_t*>(b);
  uint16_t* y = static_cast<uint16_t*>(d);
  const int64_t runs = product.inner() / 4;
  std::vector<float> sums(product.columns());
  for (int64_t i = 0; i < product.outer(); ++i) {
    sums.assign(sums.size(), 0);
    for (int64_t run = 0; run < runs; ++run)
      for (int which = 0; which < 2; ++which) {
        const Kept& own = kept[i * runs + run];
        const int64_t k = 4 * run + own.place[which];
        for (int64_t j = 0; j < product.columns(); ++j)
          sums[j] += wide(own.value[which]) *
                     wide(x[product.transposed_b ? product.b.at(j, k) : product.b.at(k, j)]);
      }
    for (int64_t j = 0; j < product.columns(); ++j) y[product.c.at(i, j)] = narrow(scale * sums[j]);
  }
  return CUSPARSE_STATUS_SUCCESS;
}

cusparseStatus_t cusparseLtMatmulSearch(const cusparseLtHandle_t* handle,
                                        cusparseLtMatmulPlan_t* plan, const void* alpha,
                                        const void* a, const void* b, const void* beta,
                                        const void* c, void* d, void* workspace,
                                        cudaStream_t* streams, int32_t count) {
  ++searches;
  const cusparseStatus_t status =
      cusparseLtMatmul(handle, plan, alpha, a, b, beta, c, d, workspace, streams, count);
  as<Plan>(plan).workspace = 1 << 16;  // the fastest may need more
  return status;
}

}  // extern "C"
