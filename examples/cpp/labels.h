// What the programs share: arguments, checks, times and messages.
#pragma once

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <iostream>
#include <regex>
#include <string>
#include <vector>

#include "pictures.h"

constexpr char kDescription[] = "emanet_triton_export";  // a key in the metadata of a file

using Shape = std::vector<int64_t>;

// A file of `emanet-triton export` that has been opened.
struct Network {
  std::string description;  // the text of the metadata, in JSON; "" if there is none
  // RGB pixels, uint8 [height, width, 3] or [1, height, width, 3], to labels in the same order.
  std::function<std::vector<uint8_t>(uint8_t* pixels, const Shape& shape)> labels;
};

// The shape in which a network takes a picture. The description has the lengths of the axes; a
// length is a name, such as "height", in a file for all sizes.
//
// The code of a package does not check the shape, and reads beyond a picture that is too small.
inline Shape input_shape(const std::string& file, const std::string& description,
                         const std::string& path, const Picture& picture) {
  std::smatch found;
  const std::regex part("\"part\": \"image-to-labels\"");
  const std::regex shape("\"shape\": \\[(?:([^,\\]]+), )?([^,\\]]+), ([^,\\]]+), 3\\]");
  if (!std::regex_search(description, part) || !std::regex_search(description, found, shape)) {
    throw InputError(file + ": expected a file of --part image-to-labels");
  }
  const std::string batch = found[1], height = found[2], width = found[3];
  const auto fits = [](const std::string& length, int64_t got) {
    return length[0] == '"' || length == std::to_string(got);
  };
  if (!fits(height, picture.height) || !fits(width, picture.width)) {
    const std::string size = height + "x" + width + " pixels (height x width)";
    throw InputError(path + ": expected " + size + ", got " + picture.size());
  }
  if (batch.empty()) return {picture.height, picture.width, 3};
  if (!fits(batch, 1)) throw InputError(file + ": expected a file for one picture at a time");
  return {1, picture.height, picture.width, 3};
}

// Read a picture, compute its labels, and write them. `open_file` opens a file.
inline void label(const std::string& file, const std::string& path, const std::string& labels_path,
                  int runs, Network (*open_file)(const std::string& file)) {
  if (!std::filesystem::is_regular_file(file)) throw InputError(file + ": no such file");
  Picture picture = read_ppm(path);
  const Network network = open_file(file);
  std::cout << network.description << "\n";
  const Shape shape = input_shape(file, network.description, path, picture);
  std::vector<uint8_t> labels;
  for (int i = 1; i <= runs; ++i) {
    const auto start = std::chrono::steady_clock::now();
    labels = network.labels(picture.values.data(), shape);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    std::cout << "run " << i << ": " << took.count() << " s\n";
  }
  write_pgm(labels_path, labels, picture.height, picture.width);
}

inline int run(int count, char** arguments, Network (*open_file)(const std::string& file)) {
  try {
    const int runs = count == 5 ? std::atoi(arguments[4]) : 1;
    if (count < 4 || count > 5 || runs < 1) {
      throw InputError("expected FILE PICTURE.ppm LABELS.pgm [RUNS]");
    }
    label(arguments[1], arguments[2], arguments[3], runs, open_file);
    return 0;
  } catch (const std::exception& error) {
    const std::string text = error.what();
    std::cerr << arguments[0] << ": " << text.substr(0, text.find('\n')) << "\n";
    return 2;
  }
}
