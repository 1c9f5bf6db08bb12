// Pictures without a library: binary PPM (P6) and PGM (P5) with one byte per value.
#pragma once

#include <cctype>
#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

// An error that the user can correct. Its text is one line.
struct InputError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Picture {
  int64_t height, width;        // in pixels
  std::vector<uint8_t> values;  // RGB [height, width, 3]

  std::string size() const { return std::to_string(height) + "x" + std::to_string(width); }
};

// The next number of a header; 0 if there is none. Lines of comment begin with '#'.
inline int64_t header_number(std::istream& file) {
  std::string comment;
  while ((file >> std::ws).peek() == '#') std::getline(file, comment);
  int64_t number = 0;
  file >> number;
  return number;
}

inline Picture read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw InputError(path + ": cannot be opened");
  std::string kind(2, ' ');
  file.read(kind.data(), 2);
  if (kind != "P6") throw InputError(path + ": not a binary PPM picture (P6)");

  constexpr int64_t longest = 1 << 16;  // so that no product overflows
  const int64_t width = header_number(file), height = header_number(file);
  const int64_t white = header_number(file);
  if (!std::isspace(file.get()) || width < 1 || width > longest || height < 1 || height > longest) {
    throw InputError(path + ": its header is damaged");
  }
  if (white != 255) throw InputError(path + ": expected values of 0 to 255");

  // The length is compared first: a damaged header must not make the program take much memory.
  const int64_t begin = file.tellg(), wanted = height * width * 3;
  const int64_t found = static_cast<int64_t>(file.seekg(0, std::ios::end).tellg()) - begin;
  if (found != wanted) {
    throw InputError(path + ": expected " + std::to_string(wanted) + " bytes of pixels, got " +
                     std::to_string(found));
  }
  Picture picture{height, width, std::vector<uint8_t>(wanted)};
  file.seekg(begin).read(reinterpret_cast<char*>(picture.values.data()), wanted);
  if (!file) throw InputError(path + ": cannot be read");
  return picture;
}

// Write a grey picture, values uint8 [height, width].
inline void write_pgm(const std::string& path, const std::vector<uint8_t>& values, int64_t height,
                      int64_t width) {
  if (static_cast<int64_t>(values.size()) != height * width) {
    throw InputError(path + ": got " + std::to_string(values.size()) + " values");
  }
  std::ofstream file(path, std::ios::binary);
  file << "P5\n" << width << " " << height << "\n255\n";
  file.write(reinterpret_cast<const char*>(values.data()), height * width);
  if (!file.flush()) throw InputError(path + ": cannot be written");
}
