// Random operations on the radix tree, to be built with sanitizers: fuzz_radix SEED OPERATIONS.
//
// Every page remembers the tokens that lead to it, so that a match can be checked page by page, and who owns it. Inputs
// lie in heap buffers of their exact size, where a read beyond the end is caught. Exits with 1 and a line of text at
// the first thing that is wrong.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/radix/compare.hpp"
#include "../../csrc/radix/radix_tree.hpp"

namespace {

using minisgl::RadixTree;
using Tokens = std::vector<std::int32_t>;

void expect(bool ok, const char* text) {
    if (!ok) throw std::logic_error(text);
}

class Fuzzer {
  public:
    Fuzzer(unsigned seed, std::size_t page_size) : random_(seed), tree_(static_cast<std::int64_t>(page_size)) {}

    void run(int operations) {
        for (int i = 0; i < operations; ++i) {
            step();
            if (i % 16 == 0) tree_.check_integrity();
        }
        for (const Lock& lock : locks_) tree_.unlock(lock.node);
        locks_.clear();
        expect(tree_.num_evictable_pages() == tree_.num_pages(), "pages stay locked without a lock");
        evict(tree_.num_pages());
        expect(tree_.num_pages() == 0 && prefix_of_.size() == free_.size(), "pages are lost");
    }

  private:
    struct Lock {
        RadixTree::NodeId node;
        Tokens path;
    };

    std::size_t below(std::size_t bound) { return std::uniform_int_distribution<std::size_t>(0, bound - 1)(random_); }

    // Mostly the beginning of an earlier sequence, then tokens of a small alphabet.
    Tokens sequence() {
        Tokens tokens;
        if (!history_.empty() && below(4) != 0) {
            const Tokens& earlier = history_[below(history_.size())];
            tokens.assign(earlier.begin(), earlier.begin() + static_cast<std::ptrdiff_t>(below(earlier.size() + 1)));
        }
        const std::size_t extra = below(6 * tree_.page_size() + 1);
        for (std::size_t i = 0; i < extra; ++i) tokens.push_back(below(5) == 0 ? 1 : 0);
        if (history_.size() < 64) history_.emplace_back();
        history_[below(history_.size())] = tokens;
        return {tokens.begin(), tokens.end()};  // a copy without spare capacity
    }

    std::int32_t take_page() {
        if (free_.empty()) {
            free_.push_back(static_cast<std::int32_t>(prefix_of_.size()));
            prefix_of_.emplace_back();
        }
        const std::int32_t page = free_.back();
        free_.pop_back();
        return page;
    }

    // Long stretches without eviction let the tree grow to hundreds of nodes.
    void step() {
        if (below(300) == 0) growing_ = !growing_;
        const std::size_t kind = below(growing_ ? 80 : 100);
        if (kind < 35) {
            insert();
        } else if (kind < 65) {
            match();
        } else if (kind < 80) {
            if (!locks_.empty()) unlock();
        } else if (kind < 99) {
            evict(std::min(tree_.num_evictable_pages(), below(40)));
        } else {
            reset();
        }
    }

    void insert() {
        const Tokens tokens = sequence();
        std::vector<std::int32_t> pages;
        for (std::size_t i = 0; i < tokens.size() / tree_.page_size(); ++i) pages.push_back(take_page());
        const RadixTree::Match result = tree_.insert(tokens, std::vector(pages));
        for (std::size_t i = 0; i < pages.size(); ++i) {
            if (i < result.num_pages) {
                free_.push_back(pages[i]);
            } else {
                prefix_of_[pages[i]] = prefix(tokens, i + 1);
            }
        }
        expect(tree_.match_length(tokens) == pages.size(), "what was inserted isn't found");
        maybe_lock(result.node, prefix(tokens, pages.size()));
    }

    void match() {
        const Tokens tokens = sequence();
        const std::size_t expected = tree_.match_length(tokens);
        const RadixTree::Match result = tree_.match(tokens);
        expect(result.num_pages == expected, "match and match_length differ");
        expect_pages(result.node, prefix(tokens, expected));
        maybe_lock(result.node, prefix(tokens, expected));
    }

    void expect_pages(RadixTree::NodeId node, const Tokens& path) {
        std::vector<std::int32_t> pages(path.size() / tree_.page_size());
        tree_.copy_pages(node, pages);
        for (std::size_t i = 0; i < pages.size(); ++i) {
            expect(prefix_of_.at(pages[i]) == prefix(path, i + 1), "a matched page holds other tokens");
        }
    }

    void maybe_lock(RadixTree::NodeId node, Tokens path) {
        if (below(3) != 0) return;
        tree_.lock(node);
        locks_.push_back({node, std::move(path)});
    }

    void unlock() {
        const std::size_t index = below(locks_.size());
        expect_pages(locks_[index].node, locks_[index].path);
        tree_.unlock(locks_[index].node);
        locks_[index] = std::move(locks_.back());
        locks_.pop_back();
    }

    void evict(std::size_t count) {
        std::vector<std::int32_t> freed(count, -1);
        tree_.evict(freed);
        give_back(freed);
    }

    void reset() {
        std::vector<std::int32_t> freed(tree_.num_pages(), -1);
        tree_.reset(freed);
        locks_.clear();
        give_back(freed);
    }

    void give_back(const std::vector<std::int32_t>& pages) {
        for (const std::int32_t page : pages) {
            expect(!prefix_of_.at(page).empty(), "a page was freed that the tree doesn't own");
            prefix_of_[page].clear();
            free_.push_back(page);
        }
    }

    Tokens prefix(const Tokens& tokens, std::size_t pages) const {
        return {tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(pages * tree_.page_size())};
    }

    std::mt19937 random_;
    RadixTree tree_;
    std::vector<Tokens> prefix_of_;  // by page; empty: not in the tree
    std::vector<std::int32_t> free_;
    std::vector<Tokens> history_;
    std::vector<Lock> locks_;
    bool growing_ = true;
};

void fuzz_compare(unsigned seed) {
    std::mt19937 random(seed);
    for (int i = 0; i < 2000; ++i) {
        Tokens a(random() % 300), b(random() % 300);
        const std::size_t size = std::min(a.size(), b.size());
        if (size > 0 && i % 3 != 0) b[random() % size] ^= static_cast<std::int32_t>(random());
        const auto first = std::mismatch(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(size), b.begin()).first;
        expect(minisgl::common_prefix(a, b) == static_cast<std::size_t>(first - a.begin()), "common_prefix is wrong");
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return std::puts("usage: fuzz_radix SEED OPERATIONS"), 2;
    const unsigned seed = static_cast<unsigned>(std::atoi(argv[1]));
    try {
        fuzz_compare(seed);
        for (const std::size_t page_size : {1, 3, 16}) Fuzzer(seed, page_size).run(std::atoi(argv[2]));
    } catch (const std::exception& error) {
        std::printf("seed %u: %s\n", seed, error.what());
        return 1;
    }
    return 0;
}
