// Grids of positions: where the taps read, and strided sources split into phases.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "problem.h"

namespace block_sparse {

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t modulo(int64_t a, int64_t b) { return (a % b + b) % b; }

// The taps of one image axis.
struct AxisTaps {
  std::vector<int64_t> offset, place;
  std::vector<uint8_t> active;
  void add(int64_t at, bool is_active = true) {
    offset.push_back(at), place.push_back(at), active.push_back(is_active);
  }
  Axis axis(int64_t count, int64_t source_size, int64_t source_step, int64_t target_step,
            int64_t target_offset) const {
    return {count,         source_size,   source_step,
            target_step,   target_offset, int64_t(offset.size()),
            offset.data(), place.data(),  active.data()};
  }
};

inline AxisTaps output_taps(int64_t kernel, int64_t padding, int64_t dilation) {
  AxisTaps out;
  for (int64_t t = 0; t < kernel; ++t) out.add(t * dilation - padding);
  return out;
}

// Input positions phase, phase + stride, ...: each reads one output position for the taps that meet
// the stride.
inline AxisTaps input_taps(int64_t kernel, int64_t padding, int64_t dilation, int64_t stride,
                           int64_t phase) {
  AxisTaps out;
  for (int64_t t = 0; t < kernel; ++t) {
    const int64_t distance = phase + padding - t * dilation, rest = modulo(distance, stride);
    out.add((distance - rest) / stride, rest == 0);
  }
  return out;
}

// One axis of a strided source, split into phases: phase p holds the positions p, p + stride, ...,
// side by side, and zeros past the end.
struct PhaseAxis {
  int64_t stride, size;         // size: positions in a phase
  std::vector<int64_t> phases;  // those that a tap reads
  std::vector<int64_t> which;   // for each tap, the index of its phase in `phases`
  AxisTaps taps;                // what each tap reads in its phase
  PhaseAxis(const AxisTaps& whole, int64_t source_size, int64_t stride)
      : stride(stride), size(up(source_size, stride)) {
    for (int64_t offset : whole.offset) {
      const int64_t phase = modulo(offset, stride);
      which.push_back(std::find(phases.begin(), phases.end(), phase) - phases.begin());
      if (which.back() == int64_t(phases.size())) phases.push_back(phase);
      taps.add((offset - phase) / stride);
    }
  }
  void place(int64_t span) {  // span: from one phase to the next, in positions of this axis
    for (size_t t = 0; t < which.size(); ++t) taps.place[t] += span * which[t];
  }
};

// A strided source [channel, y, x, image] as [channel, phase of y, phase of x, y, x, image]: the
// positions of the output lie in it as they do in the output, and no tap has a stride.
struct Phases {
  PhaseAxis y, x;
  int64_t pixel, pitch;  // bytes of a pixel's images and of a channel
  Phases(const AxisTaps& rows, const AxisTaps& columns, int64_t height, int64_t width,
         int64_t pixel, int64_t y_stride, int64_t x_stride)
      : y(rows, height, y_stride), x(columns, width, x_stride), pixel(pixel) {
    y.place(int64_t(x.phases.size()) * y.size);
    x.place(y.size * x.size);
    pitch = count() * y.size * x.size * pixel;
    if (pitch % kPage == 0) pitch += kLine;
  }

  int64_t count() const { return int64_t(y.phases.size() * x.phases.size()); }

  // One channel; `from` has rows of `width` pixels.
  void copy(const char* from, int64_t height, int64_t width, char* to) const {
    for (int64_t first_y : y.phases)
      for (int64_t first_x : x.phases)
        for (int64_t i = 0; i < y.size; ++i, to += x.size * pixel) {
          const int64_t at = first_y + i * y.stride,
                        count = at < height && first_x < width ? up(width - first_x, x.stride) : 0;
          take(from + (at * width + first_x) * pixel, count, to);
          std::memset(to + count * pixel, 0, (x.size - count) * pixel);
        }
  }

 private:
  static constexpr int64_t kLine = 64;

  void take(const char* row, int64_t count, char* to) const {
    if (pixel == 2)
      pixels<2>(row, count, to);
    else if (pixel == 4)
      pixels<4>(row, count, to);
    else
      pixels<0>(row, count, to);
  }
  template <int Size>
  void pixels(const char* row, int64_t count, char* to) const {
    const int64_t size = Size ? Size : pixel;
    for (int64_t j = 0; j < count; ++j) std::memcpy(to + j * size, row + j * x.stride * size, size);
  }
};

}  // namespace block_sparse
