// RadixTree::check_integrity, which tests and debugging call: O(everything), and apart from the code that serves.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "radix/radix_tree.hpp"

namespace minisgl {

namespace {

void check(bool ok, const std::string& text) {
    if (!ok) throw std::logic_error("prefix cache: " + text);
}

}  // namespace

void RadixTree::check_integrity() const {
    for (std::size_t id = 1; id < nodes_.size(); ++id) {
        if (nodes_[id].parent != kUnused) check_links(static_cast<NodeId>(id));
    }
    check_ring();
    check_totals();
}

void RadixTree::check_links(NodeId id) const {
    const Node& node = nodes_[id];
    const std::string name = "node " + std::to_string(id);
    check(!node.pages.empty(), name + " holds no page");
    check(node.tokens.size() == node.pages.size() * page_size_, name + ": tokens and pages don't fit together");
    check_node(node.parent);
    check(find_child(node.parent, node.tokens) == id, name + " is not found below its parent");
    check(node.locks >= 0, name + " has a negative number of locks");
    check((node.older != kNone) == (node.locks == 0), name + " is in the ring and locked, or neither");
}

// Every node of the ring is unlocked and comes after its children; the ring's links agree in both directions.
void RadixTree::check_ring() const {
    std::vector<std::int32_t> children_passed(nodes_.size(), 0);
    std::size_t length = 0, pages = 0;
    for (NodeId id = nodes_[kRoot].newer; id != kRoot; id = nodes_[id].newer) {
        const Node& node = nodes_[id];
        const std::string name = "node " + std::to_string(id);
        check(++length < nodes_.size(), "the ring doesn't close");
        check(node.parent != kUnused && nodes_[node.newer].older == id, name + " is badly linked in the ring");
        check(children_passed[id] == node.num_children, name + " counts as used before one of its children");
        ++children_passed[node.parent];
        pages += node.pages.size();
    }
    check(pages == num_evictable_,
          "evictable is " + std::to_string(num_evictable_) + ", the ring holds " + std::to_string(pages));
}

void RadixTree::check_totals() const {
    std::vector<std::int32_t> pages, locks_below(nodes_.size(), 0), children(nodes_.size(), 0);
    std::vector<NodeId> unused, free_ids = free_ids_;
    for (std::size_t id = 0; id < nodes_.size(); ++id) {
        const Node& node = nodes_[id];
        pages.insert(pages.end(), node.pages.begin(), node.pages.end());
        if (node.parent == kUnused) unused.push_back(static_cast<NodeId>(id));
        if (node.parent < 0) continue;
        ++children[node.parent];
        locks_below[node.parent] += node.locks;
    }
    for (std::size_t id = 0; id < nodes_.size(); ++id) {
        const std::string name = "node " + std::to_string(id);
        check(children[id] == nodes_[id].num_children, name + " has a wrong number of children");
        check(id == kRoot || locks_below[id] <= nodes_[id].locks, name + " has fewer locks than below");
    }
    check(pages.size() == num_pages_,
          "num_pages is " + std::to_string(num_pages_) + ", the nodes hold " + std::to_string(pages.size()));
    std::sort(pages.begin(), pages.end());
    check(std::adjacent_find(pages.begin(), pages.end()) == pages.end(), "a page is in two places of the tree");
    std::sort(free_ids.begin(), free_ids.end());
    check(free_ids == unused, "the free ids aren't exactly the unused ones");
}

}  // namespace minisgl
