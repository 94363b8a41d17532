// A program in octet's place that ends as a list says: for testing what scripts make of octet batch.
#pragma once

#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "tests/octet_server.h"

namespace octet {

class PretendedOctet {
 public:
  // How one start ends: with so many lines done in all, and this exit status. 0 and 3 leave an output.
  struct End {
    int lines = 0;
    int status = 0;
  };

  // After the last of `ends` it ends as that one says.
  explicit PretendedOctet(const std::vector<End>& ends) : directory_(fresh_path("pretended")) {
    std::filesystem::create_directory(directory_);
    std::ofstream script(path());
    script << "#!/bin/sh\nwhile [ $# -gt 0 ]; do if [ \"$1\" = --output ]; then output=$2; fi; shift; done\n"
           << "end() {\n  mkdir -p $output.octet\n"
           << "  printf '{\\n  \"lines_total\": 9,\\n  \"lines_done\": %d\\n}\\n' $1 >$output.octet/status.json\n"
           << "  case $2 in 0 | 3) touch $output ;; esac\n  exit $2\n}\n"
           << "cd " << directory_ << "\necho >>starts\ncase $(wc -l <starts) in\n";
    for (size_t i = 0; i < ends.size(); ++i) {
      const std::string start = i + 1 < ends.size() ? std::to_string(i + 1) : "*";
      script << "  " << start << ") end " << ends[i].lines << " " << ends[i].status << " ;;\n";
    }
    script << "esac\n";
    script.close();
    chmod(path().c_str(), 0755);
  }
  ~PretendedOctet() { std::filesystem::remove_all(directory_); }

  std::string path() const { return directory_ + "/octet"; }
  std::string output() const { return directory_ + "/output"; }

  // How often it was started.
  int starts() const {
    std::ifstream file(directory_ + "/starts");
    return static_cast<int>(std::count(std::istreambuf_iterator<char>(file), {}, '\n'));
  }

 private:
  const std::string directory_;
};

}  // namespace octet
