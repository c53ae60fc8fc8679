#include "radix_tree.hpp"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <stdexcept>
#include <string>

#include "compare.hpp"

#ifndef RADIX_HASH_MASK  // tests make it small, so that hashes collide
#define RADIX_HASH_MASK ~std::uint64_t{0}
#endif

namespace minisgl {

RadixTree::RadixTree(std::int64_t page_size) : page_size_(static_cast<std::size_t>(page_size)) {
    if (page_size < 1) {
        throw std::invalid_argument("page_size is " + std::to_string(page_size) + "; expected at least 1");
    }
    clear();
}

void RadixTree::clear() {
    nodes_.clear();
    free_ids_.clear();
    buckets_.assign(64, kNone);
    num_pages_ = num_evictable_ = 0;
    Node& root = nodes_.emplace_back();
    root.parent = kNone;
    root.older = root.newer = kRoot;
}

RadixTree::Match RadixTree::match(Ids tokens) {
    const Position position = descend(tokens);
    const NodeId node = node_at(position);
    touch(node);
    return {node, position.matched};
}

std::size_t RadixTree::match_length(Ids tokens) const { return descend(tokens).matched; }

void RadixTree::copy_pages(NodeId node, std::span<std::int32_t> pages) const {
    std::int32_t* end = pages.data() + pages.size();
    for (NodeId id = node; id != kRoot; id = nodes_[id].parent) {
        const auto& part = nodes_[id].pages;
        end = std::copy(part.begin(), part.end(), end - part.size()) - part.size();
    }
    assert(end == pages.data());
}

RadixTree::Match RadixTree::insert(Ids tokens, Ids pages) {
    const std::size_t end = pages.size() * page_size_;
    if (tokens.size() < end) {
        throw std::invalid_argument(std::to_string(tokens.size()) + " tokens are too few for " +
                                    std::to_string(pages.size()) + " pages of " + std::to_string(page_size_));
    }
    const Position position = descend(tokens.first(end));
    NodeId node = node_at(position);
    if (position.matched < pages.size()) {
        const std::size_t start = position.matched * page_size_;
        node = add(node, tokens.subspan(start, end - start), pages.subspan(position.matched), 0);
        num_pages_ += nodes_[node].pages.size();
        num_evictable_ += nodes_[node].pages.size();
    }
    touch(node);
    return {node, position.matched};
}

void RadixTree::lock(NodeId node) {
    check_node(node);
    for (NodeId id = node; id != kRoot; id = nodes_[id].parent) {
        if (nodes_[id].locks++ == 0) {
            leave_ring(id);
            num_evictable_ -= nodes_[id].pages.size();
        }
    }
}

void RadixTree::unlock(NodeId node) {
    check_node(node);
    if (node != kRoot && nodes_[node].locks == 0) {
        throw std::invalid_argument("node " + std::to_string(node) + " has no lock to take back");
    }
    for (NodeId id = node; id != kRoot; id = nodes_[id].parent) {
        if (--nodes_[id].locks == 0) {
            append_newest(id);
            num_evictable_ += nodes_[id].pages.size();
        }
    }
}

// The least recently used node is always a leaf: whatever touches a node touches its parent after it, so in the ring
// every node comes after its children.
void RadixTree::evict(std::span<std::int32_t> freed) {
    assert(freed.size() <= num_evictable_);
    num_pages_ -= freed.size();
    num_evictable_ -= freed.size();
    auto out = freed.begin();
    while (out != freed.end()) {
        const NodeId id = nodes_[kRoot].newer;
        Node& leaf = nodes_[id];
        assert(id != kRoot && leaf.num_children == 0);
        const std::size_t missing = static_cast<std::size_t>(freed.end() - out);
        const std::size_t keep = leaf.pages.size() - std::min(missing, leaf.pages.size());
        out = std::copy(leaf.pages.begin() + keep, leaf.pages.end(), out);
        if (keep == 0) {
            remove(id);
        } else {
            leaf.pages.resize(keep);
            leaf.tokens.resize(keep * page_size_);
        }
    }
}

void RadixTree::reset(std::span<std::int32_t> freed) {
    auto out = freed.begin();
    for (const Node& node : nodes_) out = std::copy(node.pages.begin(), node.pages.end(), out);
    clear();
}

// Follows the full pages of `tokens` as far as the tree has them.
RadixTree::Position RadixTree::descend(Ids tokens) const {
    Position position{kRoot, 0, 0};
    while (tokens.size() >= page_size_) {
        const NodeId child = find_child(position.node, tokens);
        if (child == kNone) break;
        const Node& node = nodes_[child];
        const std::size_t same = common_prefix(node.tokens, tokens) / page_size_;
        position = {child, same, position.matched + same};
        if (same < node.pages.size()) break;
        tokens = tokens.subspan(same * page_size_);
    }
    return position;
}

// The node that stands for exactly `position`, to be touched next.
RadixTree::NodeId RadixTree::node_at(const Position& position) {
    const bool whole = position.used == nodes_[position.node].pages.size();
    return whole ? position.node : split(position.node, position.used);
}

// Gives the first `used` pages of `lower` to a new node above it. Handles and children stay with the lower part.
RadixTree::NodeId RadixTree::split(NodeId lower, std::size_t used) {
    Node& node = nodes_[lower];
    const std::ptrdiff_t cut = static_cast<std::ptrdiff_t>(used * page_size_);
    const NodeId upper = add(node.parent, Ids(node.tokens).first(cut), Ids(node.pages).first(used), node.locks);
    unlink_child(lower);
    node.tokens.erase(node.tokens.begin(), node.tokens.begin() + cut);
    node.pages.erase(node.pages.begin(), node.pages.begin() + static_cast<std::ptrdiff_t>(used));
    link_child(lower, upper);
    return upper;
}

// A new node, not yet in the ring.
RadixTree::NodeId RadixTree::add(NodeId parent, Ids tokens, Ids pages, std::int32_t locks) {
    NodeId id = static_cast<NodeId>(nodes_.size());
    if (free_ids_.empty()) {
        nodes_.emplace_back();
        if (nodes_.size() > buckets_.size()) grow_buckets();
    } else {
        id = free_ids_.back();
        free_ids_.pop_back();
    }
    Node& node = nodes_[id];
    node.tokens.assign(tokens.begin(), tokens.end());
    node.pages.assign(pages.begin(), pages.end());
    node.locks = locks;
    link_child(id, parent);
    return id;
}

void RadixTree::remove(NodeId leaf) {
    leave_ring(leaf);
    unlink_child(leaf);
    nodes_[leaf] = Node{};
    free_ids_.push_back(leaf);
}

void RadixTree::check_node(NodeId node) const {
    if (node < 0 || static_cast<std::size_t>(node) >= nodes_.size() || nodes_[node].parent == kUnused) {
        throw std::invalid_argument("node " + std::to_string(node) + " is not in the tree");
    }
}

// Any function that spreads will do: a hit is confirmed against the tokens themselves.
std::uint64_t RadixTree::hash_child(NodeId parent, Ids first_page) const {
    constexpr std::uint64_t kMultiplier = 0x9E3779B97F4A7C15u;  // 2^64 / golden ratio, odd
    std::uint64_t hash = static_cast<std::uint64_t>(parent) + 1;
    for (std::size_t i = 0; i < page_size_; ++i) {
        hash = ((hash << 5 | hash >> 59) ^ static_cast<std::uint32_t>(first_page[i])) * kMultiplier;
    }
    return (hash ^ hash >> 32) & RADIX_HASH_MASK;
}

// The child of `parent` whose first page is the first of `tokens`.
RadixTree::NodeId RadixTree::find_child(NodeId parent, Ids tokens) const {
    const std::uint64_t hash = hash_child(parent, tokens);
    NodeId id = buckets_[hash & (buckets_.size() - 1)];
    for (; id != kNone; id = nodes_[id].next_in_bucket) {
        const Node& node = nodes_[id];
        if (node.hash != hash || node.parent != parent) continue;
        if (std::memcmp(node.tokens.data(), tokens.data(), page_size_ * sizeof(std::int32_t)) == 0) break;
    }
    return id;
}

void RadixTree::link_child(NodeId child, NodeId parent) {
    Node& node = nodes_[child];
    node.parent = parent;
    node.hash = hash_child(parent, node.tokens);
    node.next_in_bucket = bucket(node);
    bucket(node) = child;
    ++nodes_[parent].num_children;
}

void RadixTree::unlink_child(NodeId child) {
    Node& node = nodes_[child];
    NodeId* link = &bucket(node);
    while (*link != child) link = &nodes_[*link].next_in_bucket;
    *link = node.next_in_bucket;
    --nodes_[node.parent].num_children;
}

void RadixTree::grow_buckets() {
    buckets_.assign(buckets_.size() * 2, kNone);
    for (std::size_t id = 1; id < nodes_.size(); ++id) {
        Node& node = nodes_[id];
        if (node.parent == kUnused) continue;
        node.next_in_bucket = bucket(node);
        bucket(node) = static_cast<NodeId>(id);
    }
}

// Makes the path to `node` the most recently used, from the deepest node up.
void RadixTree::touch(NodeId node) {
    for (NodeId id = node; id != kRoot; id = nodes_[id].parent) {
        if (nodes_[id].locks > 0) continue;
        if (nodes_[id].older != kNone) leave_ring(id);
        append_newest(id);
    }
}

void RadixTree::append_newest(NodeId node) {
    const NodeId newest = nodes_[kRoot].older;
    nodes_[node].older = newest;
    nodes_[node].newer = kRoot;
    nodes_[newest].newer = node;
    nodes_[kRoot].older = node;
}

void RadixTree::leave_ring(NodeId node) {
    const NodeId older = nodes_[node].older, newer = nodes_[node].newer;
    nodes_[older].newer = newer;
    nodes_[newer].older = older;
    nodes_[node].older = nodes_[node].newer = kNone;
}

}  // namespace minisgl
